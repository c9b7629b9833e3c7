"""The nominal figures of a device that is there."""

import jax

from rsagent_jax.aot.topology import CHIPS, Chip

TPUS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e", "TPU7x": "tpu7x",
}  # fmt: skip
# Dense bf16 and memory of NVIDIA's data sheets, SXM modules but for NVL, by words of the device's name.
GPUS = {
    "H200 NVL": Chip("H200 NVL", 835e12, 141 * 10**9, 4800e9, 0.0, 0),
    "H200": Chip("H200", 989e12, 141 * 10**9, 4800e9, 0.0, 0),
    "H100 80GB HBM3": Chip("H100", 989e12, 80 * 10**9, 3350e9, 0.0, 0),
    "A100-SXM4-80GB": Chip("A100", 312e12, 80 * 10**9, 2039e9, 0.0, 0),
}


def chip_of(device: jax.Device) -> Chip | None:
    """The nominal figures of a device, where they are known."""
    kind = device.device_kind
    return CHIPS.get(TPUS.get(kind, "")) or next(
        (chip for words, chip in GPUS.items() if f" {words} " in f" {kind} "), None
    )
