"""Where each data set is had: page, licence, files or what takes a hand, and what lies under the root in the end.

Sizes and checksums of COCO's archives are those that tensorflow-datasets publishes (url_checksums, datasets/lvis);
that of GSEval is of the file in its repository, at the commit that its address names; files of a Hugging Face data set
are held against the checksums that the hub lists. Nobody publishes one for the others: the CRCs in their archives are
checked. None was fetched here, where these addresses could not be reached; they are those that the authors' pages and
issues name.
"""

import dataclasses
import json
from urllib.parse import quote

from rsagent_jax.data.download import HUB, RemoteFile, hub_endpoint, open_url
from rsagent_jax.types import DataError

_COCO = "http://images.cocodataset.org/zips/"
_PICTURES = "images/mscoco/images"
_COCO_LICENCE = "annotations CC BY 4.0; pictures by Flickr's terms of use, https://cocodataset.org/#termsofuse"
_REFER = "https://web.archive.org/web/{}/https://bvisionweb1.cs.unc.edu/licheng/referit/data/{}.zip"


@dataclasses.dataclass(frozen=True)
class Source:
    """One name of `python -m rsagent_jax.data.get`. A source with `steps` takes a hand; all others are fetched."""

    page: str
    licence: str
    gives: tuple[str, ...]  # patterns below the root, each of which finds a file when it is there
    files: tuple[RemoteFile, ...] = ()
    hub: str = ""  # OWNER/NAME of a Hugging Face data set, whose folder data/ holds the files
    needs: tuple[str, ...] = ()  # other sources: the pictures
    steps: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()  # names of configs/eval.py that rsagent_jax.data_check looks at


def _checked(name: str, *splits: str, **rest) -> Source:
    """Whose splits are checks of the same name."""
    return Source(**rest, checks=tuple(f"{name}-{split}" for split in splits))


def _refer(name: str, snapshot: str, refs: str, *splits: str) -> Source:
    """The authors' own host is gone; these are the web archive's copies that the issues of lichengunc/refer name."""
    return _checked(
        name,
        *splits,
        page="https://github.com/lichengunc/refer",
        licence="the code Apache-2.0; for the annotations none is stated; pictures: those of coco2014",
        gives=(f"{name}/{refs}", f"{name}/instances.json"),
        files=(RemoteFile(_REFER.format(snapshot, name)),),
        needs=("coco2014",),
    )


def _pictures(*files: RemoteFile) -> Source:
    folders = [file.name.removesuffix(".zip") for file in files]
    gives = tuple(f"{_PICTURES}/{folder}/*.jpg" for folder in folders)
    return Source("https://cocodataset.org/#download", _COCO_LICENCE, gives, files)


SOURCES = {
    "coco2014": _pictures(
        RemoteFile(
            f"{_COCO}train2014.zip", _PICTURES, 13510573713,
            "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
        ),
    ),
    "coco2017": _pictures(
        RemoteFile(
            f"{_COCO}train2017.zip", _PICTURES, 19336861798,
            "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
        ),
        RemoteFile(
            f"{_COCO}val2017.zip", _PICTURES, 815585330,
            "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
        ),
    ),
    "unlabeled2017": _pictures(RemoteFile(f"{_COCO}unlabeled2017.zip", _PICTURES)),
    "refcoco": _refer("refcoco", "20220413011718", "refs(unc).p", "val", "testA", "testB"),
    "refcoco+": _refer("refcoco+", "20220413011656", "refs(unc).p", "val", "testA", "testB"),
    "refcocog": _refer("refcocog", "20220413012904", "refs(umd).p", "val", "test"),
    "grefcoco": _checked(
        "grefcoco", "val", "testA", "testB",
        page="https://github.com/henghuiding/gRefCOCO",
        licence="none is stated; pictures: those of coco2014",
        gives=("grefcoco/grefs(unc).*", "grefcoco/instances.json"),
        needs=("coco2014",),
        steps=(
            "open the Google Drive or OneDrive folder that the page links to, and download the annotations",
            "put grefs(unc).json (or .p) and instances.json into {root}/grefcoco/",
        ),
    ),
    "reasonseg": _checked(
        "reasonseg", "val", "test",
        page="https://github.com/dvlab-research/LISA#dataset",
        licence="none is stated for the data; the code Apache-2.0",
        gives=("ReasonSeg/val/*.json", "ReasonSeg/test/*.json"),
        steps=(
            "open https://drive.google.com/drive/folders/125mewyg5Ao6tZ3ZdJ-1-E3n04LGVELqy and download what is in it",
            "unpack them into {root}/ReasonSeg/, so that {root}/ReasonSeg/val/ holds <id>.jpg and <id>.json",
        ),
    ),
    "refcoco_m": _checked(
        "refcoco_m", "val",
        page=f"{HUB}/datasets/moondream/refcoco-m",
        licence="MIT; the pictures, which are in it, are COCO's",
        gives=("refcoco_m/validation*.jsonl", "refcoco_m/images/*.jpg"),
        hub="moondream/refcoco-m",
    ),
    "muse": _checked(
        "muse", "val", "test_less", "test_many",
        page="https://github.com/MaverickRen/PixelLM",
        licence="Apache-2.0; pictures: those of coco2014 and coco2017",
        gives=("muse/muse_val.json", "muse/muse_test_less.json", "muse/muse_test_many.json"),
        needs=("coco2014", "coco2017"),
        steps=(
            "download https://drive.google.com/file/d/1IutofOF65azPEChVfyJWpcn3JgCfYwmA/view",
            "where it does not open: issue 19 of the page, which names this address, is where others ask for it",
            "put muse_val.json, muse_test_less.json and muse_test_many.json into {root}/muse/",
        ),
    ),
    "mmr": _checked(
        "mmr", "val", "test_mixed", "test_obj_only", "test_part_only",
        page="https://github.com/jdg900/MMR",
        licence="Apache-2.0; pictures: those of coco2017",
        gives=("MMR/MMR_val.json", "MMR/MMR_test_*.json"),
        needs=("coco2017",),
        steps=(
            "open https://drive.google.com/drive/folders/1d8FIs4cCmQLMuYAB4s2-_bH0HUI3CjNC, and download its files",
            "put MMR_val.json and the three MMR_test_….json into {root}/MMR/",
        ),
    ),
    "gseval": _checked(
        "gseval", "all",
        page="https://github.com/hustvl/GroundingSuite",
        licence="Apache-2.0; pictures: those of unlabeled2017",
        gives=("gseval/GroundingSuite-Eval.jsonl",),
        files=(
            RemoteFile(
                "https://raw.githubusercontent.com/hustvl/GroundingSuite/6bb6cde14087e79c740722e82821a0c832fb47b7/"
                "GroundingSuite-Eval.jsonl",
                "gseval", 4155144, "e14630a6272cbf6bfdef6704cec43150ba8af979fc00284ff1ce7ab4e55847ea",
            ),
        ),
        needs=("unlabeled2017",),
    ),
}  # fmt: skip


def files_of(name: str, base_url: str = "") -> tuple[RemoteFile, ...]:
    """What is to be fetched for a source, by their names from the mirror `base_url` if there is one. Of a Hugging Face
    data set, what the hub lists (HF_ENDPOINT names another one, HF_TOKEN opens what is gated), with its checksums."""
    source = SOURCES[name]
    if not source.hub:
        base = f"{base_url.rstrip('/')}/"
        return tuple(dataclasses.replace(f, url=base + quote(f.name)) if base_url else f for f in source.files)
    endpoint = hub_endpoint()
    address = f"{endpoint}/api/datasets/{source.hub}/tree/main/data"
    resolve = f"{endpoint}/datasets/{source.hub}/resolve/main/"
    try:
        with open_url(address) as response:
            rows = [row for row in json.load(response) if row["path"].endswith(".parquet")]
        return tuple(RemoteFile(resolve + r["path"], name, r["size"], (r.get("lfs") or {}).get("oid")) for r in rows)
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{address} does not list the files of {source.hub} ({error!r}); see {source.page}") from None
