"""Records are read to the bit as np.load reads them, without the parser that threads cannot share."""

import ast
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rsagent_jax.data.npz import read_arrays

KINDS = st.sampled_from(["<i4", "<f4", "<f8", "|b1", "|u1", "<i8", "<u2"])
SOME = st.dictionaries(
    st.sampled_from(["tokens", "positions", "image_0", "header"]),
    KINDS.flatmap(lambda kind: arrays.arrays(kind, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0))),
)


def saved(**values) -> bytes:
    out = io.BytesIO()
    np.savez(out, **values)
    return out.getvalue()


@settings(max_examples=100)
@given(SOME, st.booleans())
def test_every_array_is_what_np_load_reads(values, fortran):
    content = saved(**{name: np.asfortranarray(value) if fortran else value for name, value in values.items()})
    found = read_arrays(content)
    with np.load(io.BytesIO(content)) as wanted:
        assert found.keys() == set(wanted.files)
        for name, value in found.items():
            assert value.dtype == wanted[name].dtype and value.shape == wanted[name].shape
            assert value.tobytes() == wanted[name].tobytes()


@pytest.mark.parametrize(
    ("value", "match"),
    [(np.array(["word"]), "header as np.save"), (np.zeros(3, ">i4"), "header"), (np.zeros(2, "i4,f4"), "header")],
)
def test_an_array_of_a_kind_that_no_record_has_is_refused(value, match):
    with pytest.raises(ValueError, match=match):
        read_arrays(saved(tokens=value))


def test_the_parser_is_not_asked(monkeypatch):
    """np.load asks it once per array, which is what made threads fail; shown here so that the test tests something."""
    asked = []
    parse = ast.literal_eval
    monkeypatch.setattr(ast, "literal_eval", lambda text: asked.append(text) or parse(text))
    content = saved(tokens=np.arange(5), positions=np.zeros((3, 5), np.int32))
    with np.load(io.BytesIO(content)) as file:
        assert len([file[name] for name in file.files]) == len(asked) == 2
    read_arrays(content)
    assert len(asked) == 2
