"""The unpickler reads what pickle.loads reads, as long as it is data, and runs nothing of anything else."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rsagent_jax.data.sets import unpickle
from rsagent_jax.data.sets.unpickle import loads_data
from rsagent_jax.types import DataError
from tests.refusals import refused

QUICK = settings(max_examples=150, deadline=None)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
DATA = st.recursive(
    PLAIN | st.sets(st.integers() | st.text()) | st.frozensets(st.binary()),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(PLAIN, inner),
    max_leaves=20,
)
SENTENCE = {"raw": "Caf\xe9 man.", "sent": "cafe man", "sent_id": 1, "tokens": ["cafe", "man"]}
REFS = [{"ref_id": 7, "ann_id": 2**40, "split": "testA", "sent_ids": [1, 2], "sentences": [SENTENCE]}] * 3


@QUICK
@given(data=DATA, protocol=st.integers(0, 5))
def test_data_reads_as_with_pickle(data, protocol):
    assert loads_data(pickle.dumps(data, protocol), "x") == data


def test_python2_strings_and_unicode():
    # python2: pickle.dumps({'sent': 'caf\xe9', u'raw': u'\xe9'}, 2)
    pickled = b"\x80\x02}q\x01(U\x04sentq\x02U\x04caf\xe9X\x03\x00\x00\x00rawX\x02\x00\x00\x00\xc3\xa9u."
    assert loads_data(pickled, "x") == {"sent": "caf\xe9", "raw": "\xe9"}
    # protocol 0, python2: {'a': [1L, 'b']}
    assert loads_data(b"(dp0\nS'a'\np1\n(lp2\nL1L\naS'b'\np3\nas.", "x") == {"a": [1, "b"]}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value", [np.int64(-5), np.float32(0.5), np.bool_(True), np.uint8(255), np.dtype(">i4").type(9)]
)
def test_numpy_scalars_become_numbers(value, protocol):
    read = loads_data(pickle.dumps([value], protocol), "x")
    assert read == [value.item()] and type(read[0]) is type(value.item())


@st.composite
def damaged(draw):
    whole = pickle.dumps(REFS, draw(st.integers(0, 5)))
    at = draw(st.integers(0, len(whole) - 1))
    return whole[:at] + bytes([draw(st.integers(0, 255))]) + whole[at + 1 :]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | damaged())
@example(b"Nr\xff\xff\xff\xff.")  # a memo index that makes the C unpickler reserve 64 GB
@example(b"N.trailing")
@example(b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f.")  # a bytearray of 8 EiB
@example(b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f.")  # a frame of 8 EiB
@example(b"\x8a\xff" + b"\xff" * 255 + b".")
def test_random_bytes_and_damaged_pickles_only_ever_raise_dataerror(data):
    try:
        loads_data(data, "x")
    except DataError as error:
        assert str(error).startswith("x ")


@pytest.mark.parametrize("protocol", range(6))
def test_every_truncation_is_an_error(protocol):
    whole = pickle.dumps(REFS, protocol)
    for length in range(len(whole)):
        refused(r"x is (cut short|not a readable pickle|refused)", loads_data, whole[:length], "x")
    half = len(whole) // 2
    refused(f"cut short: it ends after {half} bytes", loads_data, whole[:half], "x")


class _Runs:
    def __init__(self, function, *args):
        self.how = (function, args)

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize("protocol", range(6))
def test_os_system_is_refused_and_nothing_runs(tmp_path, protocol):
    witness = tmp_path / "witness"
    data = pickle.dumps([_Runs(os.system, f"touch {witness}")], protocol)
    refused(r"wants to import (posix|os)\.system.*Nothing of it was run", loads_data, data, "refs.p")
    assert not witness.exists()
    pickle.loads(data)  # the attack is real: the ordinary unpickler runs it
    assert witness.exists()


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (b"(S'true'\nios\nsystem\n.", "os.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.", "builtins.eval"),
        (b"\x80\x02c__builtin__\ngetattr\n.", "__builtin__.getattr"),
        (pickle.dumps(np.zeros(3)), "_reconstruct"),
        (pickle.dumps(REFS[0].keys.__self__.__class__), "builtins.dict"),
        (b"cnumpy\nload\n.", "numpy.load"),
        (b"Pname\n.", "PERSID"),
        (b"\x82\x01.", "EXT1"),
        (b"]}b.", "set the state of a list"),
        (b"c_codecs\nencode\nVx\nVrot13\n\x86R.", "rot13"),
        (b"cnumpy\ndtype\n\x8c\x01O\x85R.", "dtype 'O'"),
        (b"<!DOCTYPE html><title>404</title>", "so it is an HTML page"),  # what a dead mirror sends
        (b"", "cut short: it ends after 0 bytes"),
    ],
)
def test_refusals_name_what_was_wanted_or_found(data, named):
    refused(named, loads_data, data, "x")


def test_attributes_of_the_allowed_functions_cannot_be_set():
    before = dict(vars(unpickle._bytes_from_text))
    refused("set the state of a function", loads_data, b"c_codecs\nencode\n}S'a'\nNsb.", "x")
    assert vars(unpickle._bytes_from_text) == before


def test_nested_keys_cannot_make_hashing_take_for_ever():
    """t = (t, t) sixty times over is 200 bytes, and hashing it as a key would visit 2^60 leaves."""
    nested = b"\x80\x02N" + b"".join(b"q" + bytes([k]) + b"h" + bytes([k]) + b"\x86" for k in range(60))
    # frozensets compare as slowly
    frozen = b"}(\x91Ns.", b"\x8f((\x91\x90.", b"c__builtin__\nset\n((\x91l\x85R."
    for data in (b"}" + nested[2:] + b"Ns.", b"\x8f(" + nested[2:] + b"\x90.", b"(" + nested[2:] + b"\x91.", *frozen):
        refused("not a plain value", loads_data, data, "x")
