"""The training loop, for an oracle and for a draft that learns from one.

The state of a run is a function of ``(config, seed, step)``: batches are drawn by step, orbax
writes a checkpoint to a temporary folder and renames it, and the log is cut back to the
restored step. A run that was killed therefore continues with the losses of an unbroken one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssd_jax.errors import CheckpointError, ConfigError, VocabularyMismatchError
from ssd_jax.files import first_line
from ssd_jax.gpt2 import GPT2, GPT2Config, parameter_count
from ssd_jax.training.config import TrainConfig, check_context
from ssd_jax.training.corpus import SPLITS
from ssd_jax.training.losses import losses
from ssd_jax.training.progress import Log, duration, plot
from ssd_jax.training.tokens import Batch, Batches, Generated, TokenFile


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """What a checkpoint holds: parameters and optimiser moments (float32), steps taken."""

    params: Any
    moments: Any
    step: jax.Array


def optimizer(settings: TrainConfig, params: Any) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW or Muon; linear warm-up and cosine decay.

    Muon (Jordan et al., 2024) orthogonalizes the update of every kernel by Newton-Schulz
    iterations; embeddings, biases and layer norms take Adam steps at ``adam_learning_rate``.

    Weight decay acts on matrices only (with Muon, on kernels only): shrinking layer-norm scales
    and biases towards zero has no regularizing meaning.
    """

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=min(settings.warmup, settings.steps - 1),
            decay_steps=settings.steps,
            end_value=peak * settings.final_ratio,
        )

    if settings.optimizer == "muon":
        update = optax.contrib.muon(
            schedule(settings.learning_rate),
            weight_decay=settings.weight_decay,
            adam_b2=settings.beta2,
            adam_learning_rate=schedule(settings.adam_learning_rate),
            muon_weight_dimension_numbers=_kernels,
        )
    else:
        update = optax.adamw(
            schedule(settings.learning_rate),
            b2=settings.beta2,
            weight_decay=settings.weight_decay,
            mask=jax.tree.map(lambda p: p.ndim >= 2, params),
        )
    return optax.chain(optax.clip_by_global_norm(settings.clip), update)


def _kernels(params: Any) -> Any:
    """Marks the kernels, the only matrices that act on vectors of activations, for Muon."""

    def mark(path, leaf):
        is_kernel = leaf.ndim == 2 and "kernel" in jax.tree_util.keystr(path)
        return optax.contrib.MuonDimensionNumbers() if is_kernel else None

    return jax.tree_util.tree_map_with_path(mark, params)


class Trainer:
    """Compiled step and evaluation of one model.

    The rows of a batch are spread over the local devices (data parallelism); parameters and
    optimiser state are on each.

    Args:
      config: the architecture.
      settings: optimisation settings.
      teacher: the oracle whose distribution is learnt, or ``None``.
      seed: draws the initial parameters.

    Attributes:
      devices: how many share the work: the most that divide every batch evenly.

    Raises:
      ConfigError: the context exceeds the model's positions, or ``accumulate`` does not divide
        a batch.
      VocabularyMismatchError: the teacher has another vocabulary.
    """

    def __init__(
        self, config: GPT2Config, settings: TrainConfig, *, teacher: GPT2 | None, seed: int
    ):
        check_context("training", settings, config.n_positions)
        if teacher is not None and teacher.config.vocab_size != config.vocab_size:
            raise VocabularyMismatchError(
                f"the oracle's vocabulary has {teacher.config.vocab_size} tokens, the draft's "
                f"{config.vocab_size}; train both with one tokenizer"
            )
        self.config, self.settings, self.seed = config, settings, seed
        self.graph, self._abstract = nnx.split(nnx.eval_shape(self._model))
        self._optimizer = optimizer(settings, self._abstract)
        self._losses = functools.partial(losses, settings=settings)
        parts = [batch // settings.accumulate for batch, _ in settings.shapes]
        self.devices = math.gcd(jax.local_device_count(), *parts)
        mesh = Mesh(np.array(jax.local_devices()[: self.devices]), ("data",))
        self._by_row = NamedSharding(mesh, PartitionSpec("data"))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        # An argument of the compiled step rather than a captured constant: XLA would otherwise
        # fold a copy of the oracle's weights into the program.
        self._teacher = jax.device_put(teacher, self._everywhere)
        self._steps: dict[tuple[int, int], jax.stages.Compiled] = {}
        self._evaluate = jax.jit(self._metrics)

    def _model(self) -> GPT2:
        return GPT2(self.config, dtype=self.settings.dtype, rngs=nnx.Rngs(self.seed))

    def model(self, state: TrainState) -> GPT2:
        """The model with a state's parameters."""
        return nnx.merge(self.graph, state.params)

    def abstract(self) -> TrainState:
        """Shapes, dtypes and placement of a state."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._everywhere),
            jax.eval_shape(self._new_state, self._abstract),
        )

    def initial(self, start: GPT2 | None = None) -> TrainState:
        """The state before the first step, from random weights or those of ``start``."""
        # A copy: a step donates its state, and ``start`` belongs to the caller.
        params = jax.tree.map(jnp.copy, nnx.state(start or self._model(), nnx.Param))
        return jax.device_put(self._new_state(params), self._everywhere)

    def _new_state(self, params: Any) -> TrainState:
        return TrainState(params, self._optimizer.init(params), jnp.zeros((), jnp.int32))

    def _metrics(self, params, teacher, batch):
        model = nnx.merge(self.graph, params)
        return self._losses(model, teacher, batch=batch)

    def _update(self, state: TrainState, teacher, batch):
        (loss, metrics), grads = self._gradient(state.params, teacher, batch)
        # optax mixes integer step counts with floats, which a caller's strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = self._optimizer.update(grads, state.moments, state.params)
        metrics |= {"loss": loss, "gradient_norm": optax.tree.norm(grads)}
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, moments, state.step + 1), metrics

    def _gradient(self, params, teacher, batch: Batch):
        """``((loss, metrics), gradient)``, means over the parts a batch is taken in."""
        gradient = jax.value_and_grad(self._metrics, has_aux=True)
        parts = self.settings.accumulate
        if parts == 1:
            return gradient(params, teacher, batch)

        def split(rows):
            # Every parts-th row, so that a part is spread over the devices as the batch is.
            return rows.reshape(-1, parts, rows.shape[1]).swapaxes(0, 1)

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(params, teacher, part)), None

        batches = jax.tree.map(split, batch)
        first = jax.tree.map(lambda rows: rows[0], batches)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(gradient, params, teacher, first),
        )
        total, _ = lax.scan(add, zeros, batches)
        return jax.tree.map(lambda leaf: leaf / parts, total)

    def compiled(self, batch: int, context: int) -> jax.stages.Compiled:
        """The program of one optimiser step on ``batch`` sequences of ``context`` tokens."""
        if (batch, context) not in self._steps:
            shapes: list[Any] = [
                jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=self._by_row)
                for length in (context + 1, context, context)
            ]
            step = jax.jit(self._update, donate_argnums=0)
            lowered = step.lower(self.abstract(), self._teacher, Batch(*shapes))
            self._steps[batch, context] = lowered.compile()
        return self._steps[batch, context]

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        """One optimiser step. The memory of ``state`` is reused: it is gone afterwards."""
        rows = jax.device_put(batch, self._by_row)
        return self.compiled(*batch.positions.shape)(state, self._teacher, rows)

    def evaluate(self, state: TrainState, tokens: TokenFile) -> dict[str, float]:
        """Mean losses over the first held-out windows, from position 0 on."""
        context, batch = self.settings.context, self.settings.batch
        starts = tokens.windows(context)[: self.settings.evaluate_batches * batch]
        positions = np.broadcast_to(np.arange(context), (batch, context))
        rows = [
            self._evaluate(
                state.params, self._teacher, Batch.plain(tokens.read(chunk, context), positions)
            )[1]
            for chunk in _full_chunks(starts, batch)
        ]
        return {f"heldout_{k}": float(np.mean([row[k] for row in rows])) for k in rows[0]}


def _full_chunks(starts: np.ndarray, batch: int) -> list[np.ndarray]:
    """Chunks of exactly ``batch`` windows (one compiled shape); a short corpus repeats some."""
    whole = max(len(starts) // batch, 1) * batch
    return np.split(np.resize(starts, whole), whole // batch)


# --- The run -----------------------------------------------------------------------------


def train(
    trainer: Trainer,
    text: Path,
    folder: Path,
    *,
    generated: Generated | None = None,
    start: Callable[[], GPT2 | None] = lambda: None,
    stop_at: int | None = None,
    say: Callable[[str], None] = print,
) -> TrainState:
    """Train, or resume, until ``settings.steps``; checkpoints and log go to ``folder``.

    Args:
      trainer: the model and its optimisation.
      text: folder of the encoded splits.
      folder: receives ``checkpoints/``, ``log.jsonl`` and ``loss.png``.
      generated: text of the oracle's for ``settings.generated``.
      start: gives the model whose weights (float32) a new run begins with, or ``None`` for
        random ones; not called when resuming.
      stop_at: leave after this step, as if killed (for tests).
      say: receives progress, one line at a time.

    Raises:
      DataError: a split is missing or too short.
      CheckpointError: the saved state belongs to another architecture, or cannot be written.
      ConfigError: the loss is no longer finite; nothing of that step is saved.
    """
    settings = trainer.settings
    data, heldout = (TokenFile(text, split) for split in SPLITS)
    batches = Batches(data, settings, trainer.config.n_positions, trainer.seed, generated)
    folder.mkdir(parents=True, exist_ok=True)
    with _manager(folder, settings.checkpoint_every) as manager:
        first = manager.latest_step() or 0
        say(_summary(trainer, data, first))
        if first < settings.steps:
            say(_outlook(trainer, batches, settings.steps - first))
        state = _resume(manager, trainer, start)
        log = Log(folder / "log.jsonl", first, settings, say)
        for step in range(first, settings.steps):
            if step == stop_at:
                return state
            batch = batches(step)
            state, metrics = trainer.step(state, batch)
            metrics["tokens"] = batch.positions.size
            done = step + 1
            if not np.isfinite(float(metrics["loss"])):
                raise ConfigError(
                    f"the loss is {float(metrics['loss'])} at step {done}; lower the learning rate "
                    f"and run again: step {manager.latest_step() or 0} is intact"
                )
            evaluated = (
                trainer.evaluate(state, heldout)
                if done % settings.evaluate_every == 0 or done == settings.steps
                else {}
            )
            log.add(done, metrics, evaluated)
            _save(manager, state, done, last=done == settings.steps)
            if evaluated:
                plot(folder / "log.jsonl", folder / "loss.png")
    return state


def _summary(trainer: Trainer, data: TokenFile, first: int) -> str:
    """What is about to be trained, in one line."""
    settings = trainer.settings
    shapes = [settings.shape(step) for step in range(settings.steps)]
    tokens = sum(batch * context for batch, context in shapes)
    epoch = len(data.windows(settings.context)) * settings.context
    return (
        f"{parameter_count(trainer.model(trainer.abstract())):,} parameters, "
        f"{settings.steps:,} steps of {math.prod(shapes[0]):,} tokens: "
        f"{tokens / 1e6:,.1f}M tokens, {tokens / epoch:.2f} epochs of {epoch / 1e6:,.1f}M"
        + (f"; {first:,} steps are done" if first else "")
    )


def _outlook(trainer: Trainer, batches: Batches, steps: int) -> str:
    """Time and memory that ``steps`` more steps will take, from two steps on a throwaway state.

    The programs stay compiled for the run itself.
    """
    batch = batches(0)
    state, metrics = trainer.step(trainer.initial(), batch)
    jax.block_until_ready(metrics)
    start = time.perf_counter()
    state, metrics = trainer.step(state, batch)
    jax.block_until_ready(metrics)
    seconds = time.perf_counter() - start
    memory: Any = trainer.compiled(*batch.positions.shape).memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    held += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return (
        f"on {trainer.devices} device{'s' * (trainer.devices > 1)}: about {seconds:.2g} s a step, "
        f"{duration(steps * seconds)} in all; {held / 1e9:.2g} GB of memory each"
    )


def _save(manager: ocp.CheckpointManager, state: TrainState, step: int, last: bool) -> None:
    try:
        manager.save(step, args=ocp.args.StandardSave(state), force=last)
    except (OSError, ValueError, RuntimeError) as error:
        kept = manager.latest_step()
        raise CheckpointError(
            f"cannot save step {step} in {manager.directory} ({first_line(error)}); "
            + (f"step {kept} is intact: " if kept else "")
            + "free disk space and run again"
        ) from error


def _manager(folder: Path, every: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, save_interval_steps=every, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager((folder / "checkpoints").resolve(), options=options)


def _resume(
    manager: ocp.CheckpointManager,
    trainer: Trainer,
    start: Callable[[], GPT2 | None] = lambda: None,
) -> TrainState:
    latest = manager.latest_step()
    if latest is None:
        return trainer.initial(start())
    try:
        state = manager.restore(latest, args=ocp.args.StandardRestore(trainer.abstract()))
        return cast(TrainState, state)
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"the checkpoint in {manager.directory} does not fit this model ({reason}); "
            "restore the config, or remove the folder to start over"
        ) from error


def last_step(folder: Path) -> int:
    """The step of the last saved state of a run.

    Raises:
      CheckpointError: there is none.
    """
    with _existing(folder) as manager:
        return manager.latest_step() or 0


def restore(trainer: Trainer, folder: Path) -> TrainState:
    """The last saved state of a run.

    Raises:
      CheckpointError: there is none, or it belongs to another architecture.
    """
    with _existing(folder) as manager:
        return _resume(manager, trainer)


def _existing(folder: Path) -> ocp.CheckpointManager:
    if not (folder / "checkpoints").is_dir():
        raise CheckpointError(f"no checkpoint in {folder}; train this model first")
    return _manager(folder, 1)
