"""Writes trl_losses.npz: loss and gradient of every objective that TRL and this package share, by TRL's own code.

  git clone https://github.com/huggingface/trl && git -C trl checkout f2cd57710ae345ea6428ae95363267fcf38a3dc8
  python tests/golden/make_trl_losses.py trl/trl/trainer/grpo_trainer.py

`GRPOTrainer._compute_loss` is cut out of that file (1.10.0.dev0) and run as it stands, on log-probs and entropies that
are given in place of a model's. Nothing of TRL has to be installed. Three rows, the last half forced (`tool_mask`).
"""

import ast
import collections
import itertools
import math
import pathlib
import sys
import types

import numpy as np
import torch

LENGTH = 8
VARIANTS = {  # loss_type -> importance_sampling_level
    "grpo": ("token", "sequence"),
    "bnpo": ("token", "sequence"),
    "dr_grpo": ("token", "sequence"),
    "dapo": ("token", "sequence"),
    "cispo": ("token",),
    "sapo": ("token",),
}


def compute_loss(path: str):
    tree = ast.parse(pathlib.Path(path).read_text())
    (found,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "_compute_loss"]
    least = lambda x: x[~x.isnan()].min()  # noqa: E731 - what is only logged
    most = lambda x: x[~x.isnan()].max()  # noqa: E731
    space = {"torch": torch, "math": math, "nanmin": least, "nanmax": most}
    exec(compile(ast.Module([found], []), path, "exec"), space)
    return space["_compute_loss"]


def stub(loss_type: str, level: str, beta: float, corrected: bool, entropy: float, leaves):
    alone = types.SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True, gather_for_metrics=None
    )
    args = types.SimpleNamespace(
        delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, use_bias_correction_kl=False
    )
    return types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (*leaves, None),
        args=args,
        accelerator=alone,
        model=types.SimpleNamespace(training=True),
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=1.3 if loss_type == "cispo" else 0.3,  # an upper bound there, not a distance
        use_vllm=corrected,
        vllm_importance_sampling_correction=corrected,
        entropy_coef=entropy,
        _entropy_bonus_enabled=entropy > 0,
        use_adaptive_entropy=False,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        max_completion_length=LENGTH,
        current_gradient_accumulation_steps=1,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    )


def main(path: str) -> None:
    rng, loss_of = np.random.default_rng(0), compute_loss(path)
    shape = (3, LENGTH)
    mask = np.array([[1] * 8, [1] * 5 + [0] * 3, [0] * 3 + [1] * 5])
    logps = rng.normal(-2, 0.5, shape)
    arrays = {
        "logprobs": logps,
        "old": logps + rng.normal(0, 0.3, shape),
        "ref": logps + rng.normal(0, 0.3, shape),
        "entropy": rng.uniform(0.1, 2, shape),
        "advantages": np.array([1.5, -0.7, -1.1]),
        "correction": rng.uniform(0.3, 2, shape),
        "mask": mask,
    }
    out = {name: np.asarray(a, np.float32) for name, a in arrays.items()}
    t = {name: torch.tensor(a) for name, a in out.items()}
    for kind, levels in VARIANTS.items():
        entropies = (0.0, 0.01) if kind in ("dapo", "bnpo", "cispo") else (0.0,)  # else not weighed as the policy is
        for level, beta, corrected, bonus in itertools.product(levels, (0.0, 0.05), (False, True), entropies):
            leaves = [t[name].clone().requires_grad_() for name in ("logprobs", "entropy")]
            ids = torch.zeros(shape, dtype=torch.long)
            inputs = {
                **dict(prompt_ids=ids, prompt_mask=ids, completion_ids=ids, completion_mask=torch.ones(shape)),
                **dict(tool_mask=t["mask"], advantages=t["advantages"], old_per_token_logps=t["old"]),
                **dict(ref_per_token_logps=t["ref"], importance_sampling_ratio=t["correction"]),
                "num_items_in_batch": t["mask"].sum(),
            }
            loss = loss_of(stub(kind, level, beta, corrected, bonus, leaves), None, inputs)
            loss.backward()
            name = f"{kind} {level} {beta} {int(corrected)} {bonus}"
            out[f"{name}/loss"] = loss.detach().numpy()
            out[f"{name}/grad"] = leaves[0].grad.numpy()
            if bonus:
                out[f"{name}/entropy_grad"] = leaves[1].grad.numpy()
    np.savez_compressed(pathlib.Path(__file__).with_name("trl_losses.npz"), **out)
    print(len([name for name in out if name.endswith("/loss")]), "variants")


if __name__ == "__main__":
    main(sys.argv[1])
