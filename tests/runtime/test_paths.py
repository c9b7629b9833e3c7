"""Files that grow by lines in a bucket, against one in memory; tests/test_buckets.py has the real client."""

from unittest import mock

from hypothesis import example, given
from hypothesis import strategies as st

from rsagent_jax.runtime import paths


class Objects(dict):
    """The file system of a bucket, as far as parts ask for it."""

    pipe_file = dict.__setitem__

    def ls(self, folder: str, detail: bool) -> list[str]:
        if not (found := [name.removeprefix(paths.SCHEME) for name in self if name.startswith(f"{folder}/")]):
            raise FileNotFoundError(folder)
        return found

    def cat(self, names: list[str]) -> dict[str, bytes]:
        return {name.removeprefix(paths.SCHEME): self[name] for name in names}

    def rm(self, names: list[str]) -> None:
        for name in names:
            del self[name]


STARTS = st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=4)  # of bursts of so many lines


@given(starts=STARTS, head=st.booleans(), gather=st.booleans(), close=st.booleans())
@example(starts=[[9]], head=True, gather=True, close=True)  # more than a part's at once, behind a small one
@example(starts=[[1, 9, 1], [1]], head=True, gather=False, close=False)
def test_lines_are_all_there_in_their_order_however_they_come(starts, head, gather, close):
    written, bucket = [], Objects()
    with mock.patch.object(paths, "_file_system", return_value=bucket), mock.patch.object(paths, "MERGE", 4):
        path = paths.open_path("gs://bucket/a.jsonl")
        if head:  # as a journal does
            paths.write_lines(path, b"head\n")
            written.append(b"head\n")
        for bursts in starts:
            file = paths.AppendFile(path, gather)
            for size in bursts:
                lines = [f"{len(written) + i}\n" for i in range(size)]
                file.waiting += lines[:-1]  # they came while a request was on its way
                file.add(lines[-1])
                file._send_later()
                written += map(str.encode, lines)
                assert paths.read_lines(path) == b"".join(written)
            if close:
                file.close()
                assert len(bucket) <= 1 + len(written) / 4
        assert not written or paths.read_lines(path) == b"".join(written)
