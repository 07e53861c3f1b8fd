"""Other engines on the same weights, to be measured in turns with our own modes.

``hf``           transformers' ``generate``, plain
``hf-assisted``  the same with our draft as its assistant
``hf-lookup``    the same, guessing from the text so far
``ctranslate2``  CTranslate2, a C++ engine, plain; converted with its own converter

Each has settings that its users would try; the fastest on a few prompts is the one measured.
Torch, transformers and ctranslate2, and JAX too, are imported only when a peer is opened, and
nothing is ever fetched.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ssd_jax.errors import DataError
from ssd_jax.files import first_line

if TYPE_CHECKING:
    from ssd_jax.gpt2 import GPT2Config

PEERS = ("hf", "hf-assisted", "hf-lookup", "ctranslate2")

DTYPES = ("float32", "bfloat16")
# How the assistant drafts: transformers' own default first.
_SCHEDULES: dict[str, dict[str, Any]] = {
    "20 while confident": dict(schedule="constant", tokens=20, threshold=0.4),
    "heuristic from 5": dict(schedule="heuristic_transient", tokens=5, threshold=0.0),
    "3 at a time": dict(schedule="constant", tokens=3, threshold=0.0),
    "5 at a time": dict(schedule="constant", tokens=5, threshold=0.0),
}
_LOOKUP_TOKENS = (3, 5, 10)
# Compiled code is for one cache size; prompts of similar lengths share one.
_CACHE_STEP = 256


@dataclass(frozen=True)
class PeerRun:
    """One continuation.

    Attributes:
      tokens: without the prompt, with the end-of-text token if it was reached.
      seconds: wall time from token ids to token ids, prompt included, compilation excluded.
      oracle_passes: passes that chose tokens, as ``Stats.rounds`` counts ours, so one a token
        in plain decoding. (Ours reads the prompt before its first such pass, transformers in
        it.) ``None`` where the engine does not tell.
    """

    tokens: list[int]
    seconds: float
    oracle_passes: int | None


@dataclass(frozen=True)
class _Job:
    """What to continue and how: ``new`` is at least 1 and fits the context."""

    prompt: list[int]
    new: int
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0


_Decode = Callable[[_Job], PeerRun]
_Settings = dict[str, Callable[[], _Decode]]  # an opener by the setting's description


@dataclass(frozen=True)
class Peer:
    """An opened engine, in its fastest setting.

    Attributes:
      name: of :data:`PEERS`.
      setting: the chosen setting, for people.
      skipped: why each setting that failed did.
    """

    name: str
    setting: str
    skipped: dict[str, str]
    _context: int
    _decode: _Decode

    @property
    def dtype(self) -> str:
        return next(dtype for dtype in DTYPES if dtype in self.setting)

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        seed: int,
    ) -> PeerRun:
        """Continue token ids, with the meaning of every option as in :func:`ssd_jax.generate`.

        One seed gives one text, but another one than ours: the engines' noise differs.
        """
        new = min(max_new_tokens, self._context - len(prompt))
        if new < 1:
            return PeerRun([], 0.0, 0)
        return self._decode(_Job(list(prompt), new, temperature, top_k, seed))


def open_peer(
    name: str,
    oracle: Path,
    draft: Path | None,
    *,
    calibration: Sequence[Sequence[int]],
    max_new_tokens: int,
    scratch: Path,
    dtypes: Sequence[str] = DTYPES,
    say: Callable[[str], None] = print,
) -> Peer:
    """Load a peer in all its settings, keep the one with the most tokens a second, greedy.

    Args:
      name: of :data:`PEERS`.
      oracle: a Hugging Face folder; all peers run where JAX does.
      draft: another one; needed by ``hf-assisted`` alone.
      calibration: a few prompts as token ids, continued in turns by all settings.
      max_new_tokens: for each of them.
      scratch: an existing folder for converted weights, which must outlive the peer.
      dtypes: to try, of :data:`DTYPES`. Texts of another dtype than ours may differ from ours.
      say: told how fast each setting is.

    Raises:
      DataError: a package or the draft is missing, or no setting works.
      CheckpointError, ConfigError: a folder holds no GPT-2.
    """
    if name not in PEERS:
        raise DataError(f"unknown peer {name!r}; choose of {', '.join(PEERS)}")
    from ssd_jax import checkpoint

    config = checkpoint.load_config(Path(oracle))
    source = _Source(Path(oracle), _draft_of(name, draft, config), config, Path(scratch))
    jobs = [_Job(list(p), min(max_new_tokens, config.n_positions - len(p))) for p in calibration]
    jobs = [job for job in jobs if job.new > 0]
    if not jobs:
        raise DataError(f"{name} has no prompt to be calibrated on; give one within the context")
    if name == "ctranslate2":
        settings = _ctranslate2_settings(source, dtypes)
    else:
        settings = _transformers_settings(name, source, dtypes)
    setting, decode, skipped = _fastest(name, settings, jobs, say)
    return Peer(name, setting, skipped, config.n_positions, decode)


@dataclass(frozen=True)
class _Source:
    """The weights, and a folder to write to."""

    oracle: Path
    draft: Path | None
    config: GPT2Config
    scratch: Path

    @property
    def eos_ids(self) -> list[int]:
        eos = self.config.eos_token_id
        ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        return [i for i in ids if 0 <= i < self.config.vocab_size]

    @property
    def device(self) -> str:
        import jax

        return "cuda" if jax.default_backend() == "gpu" else "cpu"


def _draft_of(name: str, draft: Path | None, oracle: GPT2Config) -> Path | None:
    """The draft's folder, if the peer uses it and it fits."""
    if name != "hf-assisted":
        return None
    from ssd_jax import checkpoint

    if draft is None:
        raise DataError(f"{name} needs a draft; give a stack that has one, or leave {name} out")
    config = checkpoint.load_config(Path(draft))
    if config.n_positions < oracle.n_positions or config.vocab_size != oracle.vocab_size:
        raise DataError(
            f"{name} needs a draft with the oracle's vocabulary and context; leave {name} out"
        )
    return Path(draft)


def _fastest(
    name: str, settings: _Settings, jobs: list[_Job], say: Callable[[str], None]
) -> tuple[str, _Decode, dict[str, str]]:
    """Setting and decoder with the most tokens a second, and why others failed."""
    decoders: dict[str, _Decode] = {}
    skipped: dict[str, str] = {}
    totals = {setting: [0, 0.0] for setting in settings}

    def skip(setting: str, error: Exception) -> None:
        decoders.pop(setting, None)
        skipped[setting] = f"{type(error).__name__}: {first_line(error)}"
        say(f"{name}, {setting}: skipped ({skipped[setting]})")

    for setting, opener in settings.items():
        try:
            decoders[setting] = opener()
            decoders[setting](jobs[0])  # allocates, compiles
        except Exception as error:  # whatever the engine raises: the next setting may work
            skip(setting, error)
    for job in jobs:  # in turns, so that a disturbance of the machine hits all settings
        for setting, decode in list(decoders.items()):
            try:
                run = decode(job)
            except Exception as error:
                skip(setting, error)
            else:
                totals[setting][0] += len(run.tokens)
                totals[setting][1] += run.seconds
    if not decoders:
        reasons = "; ".join(f"{setting}: {reason}" for setting, reason in skipped.items())
        raise DataError(f"{name} works in no setting ({reasons}); leave {name} out")
    speeds = {setting: totals[setting][0] / totals[setting][1] for setting in decoders}
    for setting, speed in speeds.items():
        say(f"{name}, {setting}: {speed:.0f} tokens/s")
    best = max(speeds, key=speeds.__getitem__)
    return best, decoders[best], skipped


def _import(module: str) -> Any:
    """The module; an untyped one, so that type checks need none of the peers."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"peers need {module.partition('.')[0]} ({first_line(error)}); pip install '.[peers]'"
        ) from error


# --------------------------------------------------------------------------- transformers


def _transformers_settings(name: str, source: _Source, dtypes: Sequence[str]) -> _Settings:
    torch, transformers = _import("torch"), _import("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    @functools.cache  # the settings of a dtype share their models
    def load(folder: Path, dtype: str) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True
        )
        # What the folder says of generation would fill in what a call leaves open.
        model.generation_config = transformers.GenerationConfig()
        if name == "hf-lookup":
            # Its guesses may run past the context. They are dropped there, yet embedded first.
            pad = torch.nn.functional.pad(
                model.transformer.wpe.weight, (0, 0, 0, max(_LOOKUP_TOKENS))
            )
            model.transformer.wpe.weight = torch.nn.Parameter(pad)
        return model.to(source.device).eval()

    def opener(dtype: str, **options: Any) -> Callable[[], _Decode]:
        def open_models() -> _Decode:
            oracle = load(source.oracle, dtype)
            draft = load(source.draft, dtype) if source.draft else None
            return _Generate(torch, transformers, oracle, draft, source.eos_ids, **options)

        return open_models

    if name == "hf-assisted":
        ways = {f"{kind}, ": {"schedule": kind} for kind in _SCHEDULES}
    elif name == "hf-lookup":
        ways = {f"{count} tokens, ": {"lookup": count} for count in _LOOKUP_TOKENS}
    else:
        ways = {"eager, ": {}, "compiled, static cache, ": {"compiled": True}}
    return {
        f"{way}{dtype}": opener(dtype, **options)
        for dtype, (way, options) in itertools.product(dtypes, ways.items())
    }


class _Generate:
    """transformers' ``generate`` in one setting: a :data:`_Decode`.

    Args:
      torch, transformers: the modules.
      oracle, draft: models of one dtype, on one device; the draft may be ``None``.
      eos_ids: end the text.
      compiled: ``torch.compile`` each decoding step, over a cache of fixed size.
      schedule: of :data:`_SCHEDULES`.
      lookup: tokens to guess from the text so far.
    """

    def __init__(
        self,
        torch: Any,
        transformers: Any,
        oracle: Any,
        draft: Any,
        eos_ids: list[int],
        *,
        compiled: bool = False,
        schedule: str | None = None,
        lookup: int | None = None,
    ):
        self.torch, self.transformers = torch, transformers
        self.oracle, self.draft = oracle, draft
        self.compiled, self.schedule = compiled, schedule
        self.options: dict[str, Any] = {
            "use_cache": True,
            "eos_token_id": eos_ids or None,
            "pad_token_id": eos_ids[0] if eos_ids else None,
            "prompt_lookup_num_tokens": lookup,
            "max_matching_ngram_size": 2 if lookup else None,
        }
        if compiled:
            # Without it a second cache size would be compiled for all sizes at once.
            config = transformers.CompileConfig(dynamic=False)
            config._compile_all_devices = True  # on a CPU too
            self.options["compile_config"] = config

    def __call__(self, job: _Job) -> PeerRun:
        run, compiled = self._run(job)
        while compiled:  # ends: Dynamo compiles a function a few times at most
            run, compiled = self._run(job)
        return run

    def _run(self, job: _Job) -> tuple[PeerRun, bool]:
        """The continuation, and whether anything was compiled meanwhile."""
        torch = self.torch
        graphs = self._graphs()
        passes = 0

        def count(*_: Any) -> bool:
            """A stopping criterion, asked once a pass; a hook would end up in compiled code."""
            nonlocal passes
            passes += 1
            return False

        options = self._options(job)
        torch.manual_seed(job.seed)
        started = time.perf_counter()
        ids = torch.tensor([job.prompt], device=self.oracle.device)
        with torch.inference_mode():
            text = self.oracle.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                stopping_criteria=[count],
                **options,
            )
        tokens = text[0, len(job.prompt) :].tolist()  # waits for the device
        seconds = time.perf_counter() - started
        return PeerRun(tokens, seconds, passes), self._graphs() > graphs

    def _options(self, job: _Job) -> dict[str, Any]:
        """Arguments of ``generate``, less the prompt."""
        config = dict(self.options, max_new_tokens=job.new, do_sample=job.temperature > 0)
        if job.temperature > 0:
            config |= {"temperature": job.temperature, "top_k": job.top_k or 0, "top_p": 1.0}
        options: dict[str, Any] = {
            "generation_config": self.transformers.GenerationConfig(**config)
        }
        if self.schedule:
            schedule = _SCHEDULES[self.schedule]
            # Read from the draft, which the settings share.
            self.draft.generation_config = self.transformers.GenerationConfig(
                num_assistant_tokens=schedule["tokens"],
                num_assistant_tokens_schedule=schedule["schedule"],
                assistant_confidence_threshold=schedule["threshold"],
            )
            options["assistant_model"] = self.draft
        if self.compiled:
            size = -(-(len(job.prompt) + job.new) // _CACHE_STEP) * _CACHE_STEP
            options["past_key_values"] = self.transformers.StaticCache(
                config=self.oracle.config, max_cache_len=size
            )
        return options

    def _graphs(self) -> int:
        """Graphs that Dynamo has compiled so far."""
        if not self.compiled:
            return 0
        return _import("torch._dynamo.utils").counters["stats"]["unique_graphs"]


# ---------------------------------------------------------------------------- ctranslate2


def _ctranslate2_settings(source: _Source, dtypes: Sequence[str]) -> _Settings:
    ctranslate2 = _import("ctranslate2")
    for module in ("torch", "transformers"):  # its converter's
        _import(module)
    config = source.config
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        raise DataError(
            "ctranslate2 ignores scale_attn_by_inverse_layer_idx and scale_attn_weights of "
            f"{source.oracle}; leave ctranslate2 out"
        )
    folder = source.scratch / "ctranslate2"
    convert = functools.cache(functools.partial(_convert, source, folder))

    def opener(dtype: str, threads: int) -> Callable[[], _Decode]:
        def load() -> Any:
            return ctranslate2.Generator(
                str(folder),
                device=source.device,
                compute_type=dtype,
                inter_threads=1,
                intra_threads=threads,
            )

        def open_model() -> _Decode:
            convert()
            return _Translate(ctranslate2, load, config.vocab_size, source.eos_ids)

        return open_model

    if source.device != "cpu":
        return {dtype: opener(dtype, 1) for dtype in dtypes}
    return {
        f"{dtype}, {threads} thread{'s' * (threads > 1)}": opener(dtype, threads)
        for dtype, threads in itertools.product(dtypes, sorted({1, _cpus()}))
    }


def _cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _convert(source: _Source, folder: Path) -> None:
    """Write the oracle in CTranslate2's format, in float32, with ids for tokens' texts."""
    converters = _import("ctranslate2.converters")
    names = {str(i): i for i in range(source.config.vocab_size)}

    class Converter(converters.TransformersConverter):
        def load_tokenizer(self, *_: Any, **__: Any) -> Any:
            # CTranslate2 takes prompts as texts of tokens. Ids serve as well, and neither need
            # a tokenizer nor care whether its vocabulary is the model's.
            return SimpleNamespace(
                get_vocab=lambda: names, bos_token="0", eos_token="0", unk_token="0"
            )

        def _load(self) -> Any:
            spec: Any = super()._load()
            spec.config.layer_norm_epsilon = source.config.layer_norm_epsilon  # left out for GPT-2
            return spec

    Converter(str(source.oracle)).convert(str(folder), quantization="float32", force=True)


class _Translate:
    """CTranslate2's ``generate_batch``: a :data:`_Decode`.

    Args:
      ctranslate2: the module.
      load: opens the converted model.
      vocab_size: of the model.
      eos_ids: end the text.
    """

    def __init__(self, ctranslate2: Any, load: Callable[[], Any], vocab: int, eos_ids: list[int]):
        self.ctranslate2, self.load = ctranslate2, load
        self.vocab, self.eos_ids = vocab, eos_ids
        self.generator = load()

    def __call__(self, job: _Job) -> PeerRun:
        options: dict[str, Any] = {"sampling_topk": 1}
        if job.temperature > 0:
            # Noise is drawn from a generator that each worker thread seeds only once, at its
            # first draw: only new threads heed a new seed.
            self.generator = self.load()
            self._generate(_Job(job.prompt, 1), options)  # the threads' first, greedy: no draw
            self.ctranslate2.set_random_seed(job.seed % 2**32)
            options = {
                "sampling_topk": min(job.top_k or 0, self.vocab),
                "sampling_temperature": job.temperature,
            }
        started = time.perf_counter()
        tokens = self._generate(job, options)
        return PeerRun(tokens, time.perf_counter() - started, None)

    def _generate(self, job: _Job, options: dict[str, Any]) -> list[int]:
        (result,) = self.generator.generate_batch(
            [[str(token) for token in job.prompt]],
            beam_size=1,
            max_length=job.new,
            end_token=self.eos_ids,
            return_end_token=True,
            include_prompt_in_result=False,
            **options,
        )
        return list(result.sequences_ids[0])
