"""Makes tests/golden/ref_coco: what tensorflow-datasets' own builder writes, and what it reads back from it.

Needs an environment of its own (pip install tensorflow-cpu tensorflow-datasets==4.9.10 pillow pycocotools):

  python -m rsagent_jax.tiny.synthetic --out=/tmp/scenes --train=1 --val=3 --test=1 --seed=5
  python tests/golden/make_ref_coco.py /tmp/scenes tests/golden/ref_coco
"""

import json
import pathlib
import pickle
import shutil
import sys
import tempfile

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.datasets.ref_coco import ref_coco_dataset_builder

scenes, out = map(pathlib.Path, sys.argv[1:])
refs = pickle.loads((scenes / "refcocog/refs(umd).p").read_bytes())
coco = json.loads((scenes / "refcocog/instances.json").read_text())
anns = {a["id"]: a for a in coco["annotations"]}
manual = pathlib.Path(tempfile.mkdtemp())
shutil.copytree(scenes / "images/mscoco/images/train2014", manual / "coco_train2014")
for ref in refs:
    ref |= {"ann": anns[ref["ann_id"]], "dataset": "refcocog", "dataset_partition": "umd"}
    ref["sentences"][0]["raw"] += " Größe"  # text beyond ASCII
named = {
    str(image["id"]): {"info": image, "anns": [a for a in anns.values() if a["image_id"] == image["id"]]}
    for image in coco["images"]
}
(manual / "refcoco.json").write_text(json.dumps({"ref": refs, "coco_anns": named}))

seen = {}
for kind in ("tfrecord", "array_record"):
    folder = pathlib.Path(tempfile.mkdtemp())
    builder = ref_coco_dataset_builder.Builder(config="refcocog_umd", data_dir=folder, file_format=kind)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual))
    for path in builder.data_path.glob("ref_coco-validation*"):
        target = out / kind / "ref_coco/refcocog_umd/1.1.0" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    if kind == "tfrecord":
        for n, example in enumerate(tfds.as_numpy(builder.as_dataset("validation", shuffle_files=False))):
            objects = example["objects"]
            seen |= {f"{n}/image": example["image"], f"{n}/image_id": example["image/id"]}
            seen |= {f"{n}/ids": objects["id"], f"{n}/masks": objects["mask"][..., 0] > 0}
            seen[f"{n}/raw"] = json.dumps([[t.decode() for t in row] for row in objects["refexp"]["raw"].to_list()])
            seen[f"{n}/sent_ids"] = json.dumps(objects["refexp"]["refexp_id"].to_list())
np.savez_compressed(out / "read_by_tfds.npz", **seen)
