"""The steps of a run that are not like the others: short groups, steps that fp16 skips; and averages without copies."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.training_utils import EMAModel
from runs import Tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from diffusion_lessons.engine import optimization
from diffusion_lessons.engine.checkpoints import list_checkpoints
from diffusion_lessons.engine.config import RunConfig
from diffusion_lessons.engine.devices import forget_accelerator, make_accelerator
from diffusion_lessons.engine.optimization import make_ema, make_optimizer
from diffusion_lessons.engine.run import start_run


def table(rows: int) -> TensorDataset:
    """So many rows of three inputs and a target."""
    dice = torch.Generator().manual_seed(7)
    return TensorDataset(torch.randn(rows, 3, generator=dice), torch.randn(rows, generator=dice))


def a_config(folder: Path, **fields) -> RunConfig:
    plain = dict(output_dir=str(folder), train_batch_size=1, learning_rate=0.1, lr_scheduler="constant",
                 lr_warmup_steps=0, mixed_precision="no", report_to="none", max_grad_norm=1e6)  # fmt: skip
    return RunConfig(**(plain | fields))


def micro_steps(run):
    """Train; yield after each micro-step."""
    for _ in run.epochs():
        for inputs, targets in run.batches():
            with run.accumulate():
                run.backward((run.prepared["line"](inputs) - targets).square().mean())
                run.step()
            yield


# --- groups ---


def group_sizes(batches: int, accumulation: int, epochs: int) -> list[int]:
    epoch = [min(accumulation, batches - first) for first in range(0, batches, accumulation)]
    return epoch * epochs


def means_by_hand(groups: list[list[tuple]], rate: float) -> tuple[list[float], torch.Tensor]:
    """The loss of each group, the mean over its batches, and the weights after plain gradient descent on it."""
    model, losses = Tiny(), []
    for group in groups:
        loss = sum((model(inputs) - targets).square().mean() for inputs, targets in group) / len(group)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= rate * gradient
        losses.append(loss.item())
    return losses, torch.cat([parameter.detach() for parameter in model.parameters()])


@pytest.mark.parametrize("rows, batch, accumulation, epochs, limit", [
    (5, 1, 4, 2, None), (5, 1, 3, 2, None), (3, 1, 8, 2, None), (5, 1, 4, 9, 3), (7, 2, 3, 2, None), (5, 2, 4, 2, None),
])  # fmt: skip
def test_each_group_counts_as_what_it_has(tmp_path, rows, batch, accumulation, epochs, limit):
    config = a_config(tmp_path, train_batch_size=batch, gradient_accumulation_steps=accumulation, max_train_steps=limit)
    model, loader = Tiny(), DataLoader(table(rows), batch)
    batches, groups = list(loader) * epochs, []
    for size in group_sizes(len(loader), accumulation, epochs)[:limit]:
        groups.append([batches.pop(0) for _ in range(size)])
    losses, weights = means_by_hand(groups, rate=0.1)
    with start_run(config, {"line": model}, torch.optim.SGD(model.parameters(), lr=0.1), loader,
                   num_epochs=epochs) as run:  # fmt: skip
        count = sum(1 for _ in micro_steps(run))
    assert count == sum(map(len, groups)) and run.global_step == run.total_steps == len(groups)
    assert run.losses == pytest.approx(losses, rel=1e-5)
    trained = torch.cat([parameter.detach() for parameter in model.parameters()])
    torch.testing.assert_close(trained, weights, rtol=1e-5, atol=1e-6)


def test_a_run_that_was_cut_within_a_group_takes_that_group_again(tmp_path):
    fields = dict(gradient_accumulation_steps=4, checkpointing_steps=1, max_train_steps=6)

    def trained(folder, stop_after=None, **more):
        model, loader = Tiny(), DataLoader(table(7), 1, shuffle=True)
        with start_run(a_config(folder, **fields, **more), {"line": model},
                       torch.optim.SGD(model.parameters(), lr=0.1), loader) as run:  # fmt: skip
            for number, _ in enumerate(micro_steps(run), start=1):
                if number == stop_after:
                    break
        return run.losses, [parameter.detach().clone() for parameter in model.parameters()]

    whole_losses, whole = trained(tmp_path / "whole")
    trained(tmp_path / "cut", stop_after=9)  # two steps, of 4 and 3 batches, and half a group of the second epoch
    assert [each.step for each in list_checkpoints(tmp_path / "cut")] == [1, 2]
    losses, resumed = trained(tmp_path / "cut", resume_from_checkpoint="latest")
    assert losses == whole_losses[2:] and all(map(torch.equal, whole, resumed))


def test_the_accelerators_own_count_is_as_before_when_a_run_ends(tmp_path):
    config = a_config(tmp_path, gradient_accumulation_steps=4, max_train_steps=2)
    accelerator, model = make_accelerator(config), Tiny()
    with start_run(config, {"line": model}, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(table(5), 1),
                   accelerator=accelerator) as run:  # fmt: skip
        list(micro_steps(run))
    assert accelerator.gradient_accumulation_steps == 4
    forget_accelerator(accelerator)


PAIR = """
import json, sys
from pathlib import Path
import torch
from torch.utils.data import DataLoader
sys.path.insert(0, sys.argv[2])
from test_steps import Tiny, a_config, micro_steps, table
from diffusion_lessons.engine.commands import launch
from diffusion_lessons.engine.run import start_run

def train(folder):
    model = Tiny()
    config = a_config(Path(folder) / "run", gradient_accumulation_steps=4, max_train_steps=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with start_run(config, {"line": model}, optimizer, DataLoader(table(10), 1)) as run:
        list(micro_steps(run))
    note = [run.num_processes, run.losses, [each for p in model.parameters() for each in p.tolist()]]
    (Path(folder) / f"rank-{run.rank}.json").write_text(json.dumps(note))

launch(train, (sys.argv[1],), num_processes=2)
"""


def test_short_groups_of_two_processes_are_means_over_both(tmp_path):
    (tmp_path / "pair.py").write_text(PAIR)
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, str(tmp_path / "pair.py"), str(tmp_path), here], capture_output=True,
                          text=True, timeout=240, env=os.environ)  # fmt: skip
    assert done.returncode == 0, done.stderr
    notes = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [note[0] for note in notes] == [2, 2]
    batches = list(DataLoader(table(10), 1))  # process 0 gets the even ones, process 1 the odd ones
    losses, weights = means_by_hand([batches[:8], batches[8:], batches[:8]], rate=0.1)
    for note in notes:
        assert note[1] == pytest.approx(losses, rel=1e-5) and note[2] == pytest.approx(weights.tolist(), rel=1e-4)


# --- steps that the scaler of fp16 skips ---

OVERFLOWS = (2, 7)  # steps whose scaled loss is not finite; the loss itself is
SCALED = dict(use_ema=True, ema_max_decay=0.5, lr_scheduler="linear", gradient_accumulation_steps=2,
              max_train_steps=10, max_grad_norm=1.0, checkpointing_steps=4)  # fmt: skip


def fp16_run(folder: Path, fused: bool, stop_after: int | None = None, overflows=OVERFLOWS, **fields) -> dict:
    """Train under a GradScaler, as fp16 does on a GPU, here on the CPU; what is left of the run, and of its steps."""
    config, model = a_config(folder, **(SCALED | fields)), Tiny()
    accelerator = make_accelerator(config)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=3)
    optimizer = make_optimizer(model.parameters(), config)
    optimizer.param_groups[0]["fused"] = fused
    optimizer._step_supports_amp_scaling = fused
    seen, loader = [], DataLoader(table(7), 1, shuffle=True)
    with start_run(config, {"line": model}, optimizer, loader, accelerator=accelerator) as run:
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"  # so that gradients are unscaled
        for _ in run.epochs():
            for inputs, targets in run.batches():
                with run.accumulate():
                    factor = 1e36 if run.global_step + 1 in overflows else 1.0
                    run.backward((run.prepared["line"](inputs) - targets).square().mean() * factor)
                    run.step()
                if accelerator.sync_gradients:
                    seen.append((run.global_step, run.schedule.get_last_lr()[0], run.emas["line"].optimization_step,
                                 run.state.skipped, accelerator.scaler.get_scale(),
                                 *(each.detach().clone() for each in (model.weight, model.bias)),
                                 *(each.clone() for each in run.emas["line"].shadow_params)))  # fmt: skip
                    if run.global_step == stop_after:
                        break
            if run.global_step == stop_after:
                break
    text = run.speed_text()
    forget_accelerator(accelerator)
    return {"seen": seen, "losses": run.losses, "text": text}


@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_step_moves_neither_weights_nor_schedule_nor_average(tmp_path, fused):
    run = fp16_run(tmp_path, fused)
    assert [step for step, *_ in run["seen"]] == list(range(1, 11)), "the data move on"
    for before, after in zip(run["seen"], run["seen"][1:], strict=False):
        skipped = after[0] in OVERFLOWS
        assert after[3] - before[3] == skipped
        assert after[2] - before[2] == (not skipped) and (after[1] == before[1]) == skipped
        assert all(map(torch.equal, before[5:], after[5:])) == skipped
        assert (after[4] == before[4] / 2) == skipped
    rates = [rate for _, rate, *_ in run["seen"]]
    assert rates[-1] == pytest.approx(0.1 * (1 - 8 / 10)), "two of ten steps of the schedule were not taken"
    assert run["text"].endswith("fp16 overflowed in 2 steps, skipped")


@pytest.mark.parametrize("fused", [True, False])
def test_an_fp16_run_resumes_exactly_after_an_overflow(tmp_path, fused):
    whole = fp16_run(tmp_path / "whole", fused)
    fp16_run(tmp_path / "cut", fused, stop_after=6)
    assert [each.step for each in list_checkpoints(tmp_path / "cut")] == [4]
    resumed = fp16_run(tmp_path / "cut", fused, resume_from_checkpoint="latest")
    assert resumed["losses"] == whole["losses"][4:] and len(resumed["seen"]) == 6
    for one, other in zip(whole["seen"][4:], resumed["seen"], strict=True):
        assert one[:5] == other[:5] and all(map(torch.equal, one[5:], other[5:]))


def test_without_overflow_nothing_is_said_of_it(tmp_path):
    run = fp16_run(tmp_path, fused=True, overflows=())
    assert run["text"].endswith("images/s on cpu") and run["seen"][-1][1] < 1e-9


# --- averages ---


class Network(ModelMixin, ConfigMixin):
    """Forty layers of 64 KiB."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(128, 128, bias=False) for _ in range(40))


class Held(TorchDispatchMode):
    """Counts the bytes of tensors that were made within the block and are still there, and keeps the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def _gone(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        given = {each.untyped_storage().data_ptr() for each in tree_leaves(arguments) if isinstance(each, torch.Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self.now += made.nbytes
                weakref.finalize(made, self._gone, made.nbytes)
        self.peak = max(self.peak, self.now)
        return result


def moved(network: Network, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_an_average_is_to_the_bit_that_of_diffusers(tmp_path, monkeypatch):
    monkeypatch.setattr(optimization, "PIECE_BYTES", 200_000)  # so that several tensors are a piece
    network, generator = Network(), torch.Generator().manual_seed(0)
    ours = make_ema(network, a_config(tmp_path, ema_max_decay=0.6))
    theirs = EMAModel(network.parameters(), decay=0.6, use_ema_warmup=True, power=0.75, foreach=True)
    for _ in range(8):
        moved(network, generator)
        ours.step(network.parameters())
        theirs.step(network.parameters())
        assert ours.cur_decay_value == theirs.cur_decay_value
        assert all(map(torch.equal, ours.shadow_params, theirs.shadow_params))


def test_an_average_moves_and_is_lent_without_a_copy_of_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(optimization, "PIECE_BYTES", 200_000)
    network, generator = Network(), torch.Generator().manual_seed(0)
    whole = sum(parameter.nbytes for parameter in network.parameters())
    average = make_ema(network, a_config(tmp_path))
    for _ in range(2):
        moved(network, generator)
        average.step(network.parameters())
    trained = [parameter.detach().clone() for parameter in network.parameters()]
    held_as = [each.data_ptr() for each in (*average.shadow_params, *network.parameters())]
    with Held() as held:
        average.step(network.parameters())
        averages = [each.data_ptr() for each in average.shadow_params]
        with average.lent_to(network.parameters()):
            lent = [parameter.sum().item() for parameter in network.parameters()]
            assert lent == [each.sum().item() for each in average.shadow_params]
    assert 0 < held.peak < whole / 8, "a piece of three or four of forty tensors"
    assert held_as == [*averages, *(each.data_ptr() for each in network.parameters())], "all stay where they are"
    assert all(map(torch.equal, trained, network.parameters()))


def test_an_exchange_that_fails_halfway_gives_everything_back(tmp_path, monkeypatch):
    network, generator = Network(), torch.Generator().manual_seed(0)
    average = make_ema(network, a_config(tmp_path))
    moved(network, generator)
    before = [each.detach().clone() for each in (*network.parameters(), *average.shadow_params)]
    exchange, done = average._exchange, []

    def failing(one, other):
        if len(done) == 17:
            done.append(None)
            raise torch.OutOfMemoryError("no room for one more")
        done.append(None)
        exchange(one, other)

    monkeypatch.setattr(average, "_exchange", failing)
    with pytest.raises(torch.OutOfMemoryError), average.lent_to(network.parameters()):
        raise AssertionError("the block must not begin")
    assert all(map(torch.equal, before, [*network.parameters(), *average.shadow_params]))


def test_restoring_an_average_uses_the_tensors_that_are_there(tmp_path):
    fields = dict(use_ema=True, max_train_steps=3, checkpointing_steps=3)

    def opened(**more):
        model = Tiny(1.0)
        return start_run(a_config(tmp_path, **fields, **more), {"line": model},
                         torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(table(5), 1))  # fmt: skip

    with opened() as run:
        list(micro_steps(run))
    averages, make = [each.clone() for each in run.emas["line"].shadow_params], optimization.make_ema
    made = []

    def noted(*arguments):
        made.append(make(*arguments))
        made.append([each.data_ptr() for each in made[0].shadow_params])
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimization, "make_ema", noted)
        with opened(resume_from_checkpoint="latest") as run:
            shadows = run.emas["line"].shadow_params
            assert [each.data_ptr() for each in shadows] == made[1]
            assert all(map(torch.equal, shadows, averages))


def test_what_is_wholly_frozen_has_no_average(tmp_path):
    models = {"line": Tiny(), "frozen": Tiny().requires_grad_(False)}
    config = a_config(tmp_path, use_ema=True, max_train_steps=2)
    optimizer = torch.optim.SGD(models["line"].parameters(), lr=0.1)
    with start_run(config, models, optimizer, DataLoader(table(5), 1)) as run:
        list(micro_steps(run))
        assert list(run.emas) == ["line"]
        with run.averaged_weights():
            assert torch.equal(models["line"].bias, run.emas["line"].shadow_params[1])
    resumed = a_config(tmp_path, use_ema=True, max_train_steps=2, resume_from_checkpoint="latest")
    with start_run(resumed, models, optimizer, DataLoader(table(5), 1)) as run:
        assert run.global_step == 2
