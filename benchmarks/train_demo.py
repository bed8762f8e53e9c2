"""Train the demo model: a small DiT that learns to denoise drawn animals.

    python benchmarks/train_demo.py --output training
    python benchmarks/train_demo.py --output training --write export/demo_model

No keypoint or part is ever shown to it. Flow matching (x_t = (1 - t) x_0 + t eps) with logit-normal
timesteps and AdaLN-zero, and beside it a self-supervised loss: two views of a picture, moved, flipped and
recoloured, are noised apart, and a head that is thrown away tells from block 9's normalised input which
token of one shows the same place as a token of the other. Muon for the hidden matrices, AdamW for the
rest, an average of the weights. Interrupted, it goes on from its last checkpoint, with the very steps that
it would have taken.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from train_demo_data import NULL, PATCH, SIZE, Batch, draw_batch, gather, training_pictures

import ditf
from ditf.calib.eval.benchmarks import BENCHMARKS
from ditf.calib.eval.correspondence import evaluate_pairs, matcher
from ditf.calib.eval.creature_pairs import CreaturePairs
from ditf.calib.eval.outcomes import totals
from ditf.export.exporter import export_bundle
from ditf.export.planning.export_options import ExportOptions

WIDTH, BLOCKS = 128, 12
LAYER, TIMESTEP = 9, 100  # of the features whose PCK is followed
VALIDATION = 3  # first number of the seeds of the pairs that settings are chosen on; the test's are not
_WARM_UP = 300  # steps
_TEMPERATURE = 0.1


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the pictures, the checkpoint and the log")
    add("--write", type=Path, metavar="DIR", help="write the averaged model there as float16, and stop")
    add("--images", type=int, default=32000, help="training pictures, drawn once")
    add("--steps", type=int, default=8000, help="in all")
    add("--cooldown", type=int, default=750, help="last steps: the rate falls, pictures are seen whole")
    add("--batch", type=int, default=24, help="views: two of each picture")
    add("--align", type=float, default=0.5, help="weight of the loss that views agree; 0 for none")
    add("--kept", type=float, default=0.5, help="share of a picture's tokens that a step sees")
    add("--shift", type=float, default=-0.3, help="mean of the logit of t")
    add("--adam", type=float, default=1e-3, help="rate of AdamW")
    add("--muon", type=float, default=0.02, help="rate of Muon")
    add("--average", type=float, default=0.9995, help="decay of the average of the weights")
    add("--every", type=int, default=1000, help="steps between checkpoints")
    add("--pairs", type=int, default=64, help="whose PCK is measured at every checkpoint; 0 for none")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--device", default="cpu")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, or write what was trained."""
    options = arguments()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    training = Training(options)
    if options.write is not None:
        training.write(options.write)
    else:
        training.run(training_pictures(options.output / "pictures.npy", options.images))


def new_model() -> DiTTransformer2DModel:
    """12 blocks of width 128, initialised as DiT is (Peebles & Xie 2022, section 3.2): AdaLN-zero."""
    model = DiTTransformer2DModel(
        num_attention_heads=WIDTH // 64,
        attention_head_dim=64,
        in_channels=3,
        out_channels=3,
        num_layers=BLOCKS,
        sample_size=SIZE,
        patch_size=PATCH,
        num_embeds_ada_norm=NULL,
    )
    for name, parameter in model.named_parameters():
        if is_hidden_matrix(name, parameter):
            nn.init.xavier_uniform_(parameter)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        model.pos_embed.proj.weight *= 4.0  # the picture above the position embedding
    return model


def is_hidden_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon trains the parameter: the matrices of attention and feed-forward."""
    return parameter.ndim == 2 and name.startswith("transformer_blocks") and ".norm1." not in name


class Training:
    """The model, its average, the optimisers and the number of steps taken."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        torch.manual_seed(options.seed)
        # In evaluation mode: in training mode each block would drop labels by itself.
        self.model = new_model().to(options.device).eval()
        self.head = nn.Sequential(nn.Linear(WIDTH, 256), nn.SiLU(), nn.Linear(256, 64)).to(options.device)
        named = list(self.model.named_parameters())
        hidden = [p for name, p in named if is_hidden_matrix(name, p)]
        rest = [p for name, p in named if not is_hidden_matrix(name, p)] + list(self.head.parameters())
        self.optimisers = [
            torch.optim.AdamW(rest, lr=options.adam, betas=(0.9, 0.99), weight_decay=0.0),
            torch.optim.Muon(hidden, lr=options.muon, momentum=0.95, weight_decay=0.01),
        ]
        self.average = AveragedModel(self.model, multi_avg_fn=self._average)
        self.step = 0
        self.checkpoint = options.output / "state.pt"
        if self.checkpoint.exists():
            self._load()

    def _average(self, average: list[torch.Tensor], current: list[torch.Tensor], count: torch.Tensor) -> None:
        """An exponential average that forgets the first steps soon."""
        decay = min(self.options.average, (1 + float(count)) / (10 + float(count)))
        torch._foreach_lerp_(average, current, 1 - decay)

    def run(self, pictures: np.ndarray) -> None:
        """Train to the last step; prints loss and PCK, and appends both to log.jsonl."""
        losses: list[float] = []
        start, first = time.perf_counter(), self.step
        while self.step < self.options.steps:
            losses.append(self.take_step(pictures))
            done = self.step == self.options.steps
            if self.step % self.options.every == 0 or done:
                self.save()
                seconds = (time.perf_counter() - start) / (self.step - first)
                row = {"step": self.step, "loss": float(np.mean(losses)), "seconds_a_step": seconds}
                if self.options.pairs:
                    with TemporaryDirectory() as folder:
                        self.write(Path(folder))
                        row["pck"] = probe(Path(folder), self.options.pairs)
                losses = []
                print(json.dumps(row), flush=True)
                with (self.options.output / "log.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")

    def take_step(self, pictures: np.ndarray) -> float:
        """Take one step; returns the loss of flow matching."""
        options, left = self.options, self.options.steps - self.step
        rate = min(1.0, (self.step + 1) / _WARM_UP, left / max(options.cooldown, 1))
        for optimiser, base in zip(self.optimisers, (options.adam, options.muon), strict=True):
            optimiser.param_groups[0]["lr"] = base * rate
            optimiser.zero_grad(set_to_none=True)
        kept = options.kept if left > options.cooldown else 1.0
        batch = draw_batch(
            pictures, options.batch, kept, options.shift, options.seed, self.step, options.device
        )
        # On a CPU the fused kernel's backward takes six times as long as plain products.
        attention = sdpa_kernel(SDPBackend.MATH) if options.device == "cpu" else nullcontext()
        with torch.autocast(options.device, torch.bfloat16), attention:
            predicted, tokens = predict(self.model, batch)
            embedded = nn.functional.normalize(self.head(tokens).float(), dim=-1)
        # The velocity's error, (x_0' - x_0) / t, bounded near t = 0.
        weight = batch.t.clamp_min(0.3).square().reciprocal()[:, None, None]
        loss = (weight * (predicted.float() - batch.clean).square()).mean()
        (loss + options.align * disagreement(embedded, batch)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.average.update_parameters(self.model)
        self.step += 1
        return loss.item()

    def save(self) -> None:
        """Save the checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": self.step,
        }
        partial = self.checkpoint.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.options.device)
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        self.average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step = state["step"]

    def write(self, folder: Path) -> None:
        """Write the averaged model as a diffusers checkpoint: transformer/ in float16, and scheduler/."""
        deepcopy(self.average.module).half().save_pretrained(folder / "transformer")
        FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")


def disagreement(embedded: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy of finding each token's partner among the other view's tokens; noisy views count less.

    Args:
        embedded: unit vectors [B, n, D].
    """
    half = len(embedded) // 2
    logits = torch.einsum("bnd,bmd->bnm", embedded[:half], embedded[half:]) / _TEMPERATURE
    entropy = nn.functional.cross_entropy(
        logits.transpose(1, 2), batch.partners, ignore_index=-1, reduction="none"
    )
    weight = ((1 - batch.t[:half]) * (1 - batch.t[half:]))[:, None] * (batch.partners >= 0)
    return (entropy * weight).sum() / weight.sum().clamp_min(1e-3)


def predict(model: DiTTransformer2DModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's forward on the seen tokens alone.

    Returns:
        x_0 of each, [B, n, PATCH * PATCH * 3], and DiTF's feature at `LAYER`, [B, n, WIDTH].
    """
    condition = {"timestep": batch.t * 1000, "class_labels": batch.labels}
    hidden = gather(model.pos_embed(batch.noised), batch.kept)
    for index, block in enumerate(model.transformer_blocks):
        if index == LAYER:
            feature = block.norm1(hidden, condition["timestep"], batch.labels, hidden_dtype=hidden.dtype)[0]
        hidden = block(hidden, **condition)
    embedding = model.transformer_blocks[0].norm1.emb(*condition.values(), hidden_dtype=hidden.dtype)
    shift, scale = model.proj_out_1(nn.functional.silu(embedding)).chunk(2, dim=1)
    return model.proj_out_2(model.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None]), feature


def probe(checkpoint: Path, count: int) -> float:
    """PCK@0.1 in species of the bundle that a user would export, on pairs of the validation split."""
    options = ExportOptions(
        model=str(checkpoint), layer=str(LAYER), timestep=(TIMESTEP,), output=checkpoint / "bundle"
    )
    bundle = export_bundle(options)
    with ditf.load(bundle, "onnxruntime") as model:
        outcomes = evaluate_pairs(
            CreaturePairs(count, VALIDATION)[:count], matcher(model), BENCHMARKS["creatures"].criteria
        )
    return totals(outcomes)["pck"]["0.1"]


if __name__ == "__main__":
    main()
