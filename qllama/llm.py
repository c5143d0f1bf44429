"""`LLM`: a checkpoint, loaded, and all that a user does with it. Names and meanings are vLLM's."""

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from qllama_convert.checkpoint import Checkpoint, open_checkpoint
from qllama_convert.hub import TOKENIZER_FILES, resolve
from qllama_convert.loader import load_replicas
from qllama_convert.names import linear_shapes, weight_shapes
from qllama_convert.quantization_config import Quantization, parse_quantization
from qllama_kernels.dispatch import check_backend

from qllama import demo
from qllama.completion import Job
from qllama.config import DTYPES, LlamaConfig, token_ids
from qllama.device import compute_dtype, device_memory, free_memory, set_up_devices
from qllama.engine.engine import Engine
from qllama.engine.replicas import run_together
from qllama.engine.request import Request
from qllama.engine.runner import Runner
from qllama.engine.sampling_params import SamplingParams, bad_word_ids
from qllama.errors import CheckpointError
from qllama.outputs import RequestOutput
from qllama.parallel.memory import check_memory, plan_memory
from qllama.parallel.mesh import make_mesh, replicas
from qllama.parallel.processes import smallest
from qllama.parallel.sharding import check_split
from qllama.progress import progress_bar, waiting_for
from qllama.quantization.activations import Semantics
from qllama.tokenizer import encode_chat, encode_prompt, load_tokenizer

Prompt = str | Mapping[str, Any]
Message = Mapping[str, Any]

KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", *DTYPES)

# What is generated where neither the caller nor generation_config.json says how much.
DEFAULT_MAX_TOKENS = 256


class LLM:
    """A Llama checkpoint, ready to generate.

    Attributes:
        config: the model's architecture.
        tokenizer: the transformers tokenizer; None where the folder has none.
        quantization: how the checkpoint is quantized; None where it is not.
        mesh: the devices, axes "data" (replicas) and "model" (parts of each weight).
        max_model_len: tokens a sequence may have, prompt and output.
        eos_token_ids: tokens that end a sequence.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        tokenizer: Any | None = None,
        revision: str | None = None,
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        gpu_memory_utilization: float = 0.9,
        dtype: str = "auto",
        kv_cache_dtype: str = "auto",
        backend: str = "auto",
        activation_semantics: str = "vllm",
        speculative: Any | None = None,
        seed: int = 0,
    ) -> None:
        """Validate and load everything; what is wrong with the folder is found here.

        Args:
            model: a checkpoint folder, or a Hub id, which is downloaded into huggingface_hub's
                cache; None: the embedded demo model.
            tokenizer: a folder, a Hub id or a transformers tokenizer, in place of the checkpoint's.
            revision: branch, tag or commit of the Hub id `model`; None: its main branch.
            tensor_parallel_size: devices each weight is split over.
            data_parallel_size: replicas a batch is spread over.
            max_model_len: tokens of the longest sequence; None: the model's maximum, lowered with
                a warning to what fits into memory.
            max_num_seqs: sequences decoded together; None: 256 on a GPU, 32 on a CPU.
            max_num_batched_tokens: prompt tokens read in one dispatch, rounded down to a power of
                two; None: 2048 on a GPU, 512 on a CPU.
            gpu_memory_utilization: share of the GPU's memory to use, above 0 and at most 1.
            dtype: to compute in: "auto" (the checkpoint's on a GPU, float32 on a CPU), "bfloat16",
                "float16" or "float32". float32 widens weights and scales before dequantization and
                rounds nowhere.
            kv_cache_dtype: "auto" (float8 where the checkpoint's `kv_cache_scheme` says so, else
                the compute dtype), "fp8" (with the checkpoint's scales if it has any) or a dtype.
            backend: of quantized products and what lies between them: "auto", "xla", "reference" or
                "pallas".
            activation_semantics: "vllm", or "compressed-tensors" to reproduce the fake
                quantization of that library.
            speculative: reserved.
            seed: of requests that bring none.

        Raises:
            CheckpointError: anything wrong with the folder.
            ValueError: an argument out of range, a model that cannot be split like that, too few
                devices or too little memory.
            NotImplementedError: a backend that is not available.
        """
        check_backend(backend)
        _check_choice("dtype", dtype, ("auto", *DTYPES))
        _check_choice("kv_cache_dtype", kv_cache_dtype, KV_CACHE_DTYPES)
        _check_choice("activation_semantics", activation_semantics, get_args(Semantics))
        if speculative is not None:
            raise NotImplementedError("speculative decoding is not available so far")
        for name, value in (
            ("tensor_parallel_size", tensor_parallel_size),
            ("data_parallel_size", data_parallel_size),
            ("max_model_len", max_model_len),
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
        ):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization={gpu_memory_utilization} must be above 0 and at most 1"
            )
        set_up_devices(gpu_memory_utilization)
        on_gpu = jax.default_backend() == "gpu"

        folder = resolve(demo.model_path() if model is None else model, revision)
        with open_checkpoint(folder) as checkpoint:
            self.config = LlamaConfig.from_hf(checkpoint.config)
            _check_max_model_len(max_model_len, self.config)
            shapes = linear_shapes(self.config)
            self.quantization = parse_quantization(checkpoint, shapes)
            self.tokenizer = _tokenizer(folder, tokenizer, self.config.vocab_size)
            self.eos_token_ids = _eos_token_ids(checkpoint, self.config, self.tokenizer)
            self.default_sampling_params = _default_sampling_params(checkpoint)
            self.dtype = compute_dtype(dtype, self.config.dtype)
            self.kv_cache_dtype = _kv_cache_dtype(kv_cache_dtype, self.dtype, self.quantization)
            specs = self.quantization.linears if self.quantization else {}
            schemes = {path: spec.scheme for path, spec in specs.items()}
            check_split(self.config, shapes, schemes, tensor_parallel_size)
            self.mesh = make_mesh(tensor_parallel_size, data_parallel_size)
            plan = plan_memory(
                self.config,
                weight_shapes(self.config),
                schemes,
                size=tensor_parallel_size,
                dtype=self.dtype,
                cache_dtype=self.kv_cache_dtype,
                dequantized=backend == "auto" and not on_gpu,
            )
            devices = self.mesh.local_devices
            check_memory(plan, device_memory(devices), tokens=max_model_len or 1)
            meshes = replicas(self.mesh)
            with progress_bar("Loading", self.config.num_hidden_layers) as advance:
                models = load_replicas(
                    checkpoint,
                    self.config,
                    self.quantization,
                    meshes,
                    dtype=self.dtype,
                    backend=backend,
                    semantics=cast(Semantics, activation_semantics),
                    on_layer=lambda done: advance(),
                )
        self.backend = backend
        self.seed = seed
        self._ordinals = itertools.count()

        self.model = models[0]
        max_cache_tokens = smallest(max(free_memory(devices) // plan.cache_per_token, 0))
        self.max_model_len = _max_model_len(max_model_len, self.config, max_cache_tokens)
        budget = max_num_batched_tokens or (2048 if on_gpu else 512)
        self._engines = [
            Engine(
                Runner(
                    model,
                    cache_dtype=self.kv_cache_dtype,
                    steps=8 if on_gpu else 4,
                    mesh=mesh,
                    on_compile=_say_compiling if mesh is meshes[0] else contextlib.nullcontext,
                ),
                max_model_len=self.max_model_len,
                max_num_seqs=max_num_seqs or (256 if on_gpu else 32),
                max_num_batched_tokens=1 << (budget.bit_length() - 1),
                max_cache_tokens=max_cache_tokens,
            )
            for model, mesh in zip(models, meshes, strict=True)
        ]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt.

        Args:
            prompts: one or many: a text, `{"prompt": text}` or `{"prompt_token_ids": ids}`. Texts
                get BOS unless they begin with it; token ids are used as they are.
            sampling_params: one for all, or one for each; None: as generation_config.json says.
            use_tqdm: show a progress bar, if stderr is a terminal.

        Raises:
            ValueError: an empty prompt, one longer than `max_model_len` allows, token ids outside
                the vocabulary, a text without a tokenizer.
        """
        single = isinstance(prompts, str | Mapping)
        listed = cast(list[Prompt], [prompts] if single else list(prompts))
        encoded = [self._encode(prompt) for prompt in listed]
        return self._complete(encoded, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several, through the checkpoint's chat template.

        Args:
            messages: `{"role": ..., "content": ...}`, oldest first; or a list of such lists.
            sampling_params: as `generate`.
            add_generation_prompt: let the assistant speak next.

        Raises:
            ValueError: there is no tokenizer or chat template, or it refuses the messages.
        """
        if not messages:
            raise ValueError("messages is empty; give at least one message")
        several = not isinstance(messages[0], Mapping)
        conversations = cast(list[Sequence[Message]], list(messages) if several else [messages])
        tokenizer = self._require_tokenizer("chat() needs one")
        encoded: list[tuple[str | None, list[int]]] = []
        for conversation in conversations:
            ids = encode_chat(tokenizer, conversation, add_generation_prompt=add_generation_prompt)
            encoded.append((tokenizer.decode(ids), ids))
        return self._complete(encoded, sampling_params, True)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Complete one prompt, yielding what is new as it comes.

        Each output holds the new text, token ids and log probabilities of one completion; the last
        of a completion has its `finish_reason`. Texts joined are the text `generate` gives.
        """
        (job,) = self._jobs([self._encode(prompt)], sampling_params)
        return self._stream(job)

    def logits(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The model's float32 logits `[T, vocab_size]` for one sequence of T token ids.

        Row t predicts token t + 1. No BOS is added; the key-value cache is as in generation.

        Raises:
            ValueError: no token, too many, or one outside the vocabulary.
        """
        return self._engines[0].score(self._check_length(token_ids))

    def hidden_states(self, token_ids: Sequence[int] | np.ndarray) -> jax.Array:
        """What lm_head reads, `[T, hidden_size]` in the compute dtype, where `logits` gives its
        result: these take a small part of the memory, and stay on the device.

        Raises:
            ValueError: as `logits`.
        """
        return self._engines[0].hidden_states(self._check_length(token_ids))

    def head(self) -> Callable[[jax.Array], jax.Array]:
        """The function from hidden states `[N, hidden_size]` to float32 logits `[N, vocab_size]`.

        It goes on working after `close`, and keeps no weights but its own.
        """
        return self._engines[0].runner.without_layers().logits

    def close(self) -> None:
        """Let go of weights and cache. The LLM cannot be used afterwards."""
        del self._engines, self.model

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- from prompts to requests --------------------------------------------------------------

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """The text of a prompt, if it has one, and its token ids."""
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), prompt["prompt_token_ids"]
            prompt = prompt.get("prompt", prompt)
        if not isinstance(prompt, str):
            raise ValueError(
                f"a prompt must be a text, or a dict with 'prompt' or 'prompt_token_ids', got "
                f"{prompt!r}"
            )
        if not prompt:
            raise ValueError("the prompt is empty; give at least one character")
        tokenizer = self._require_tokenizer('give {"prompt_token_ids": [...]} instead of a text')
        return prompt, encode_prompt(tokenizer, prompt)

    def _require_tokenizer(self, otherwise: str) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                f"the checkpoint folder has no tokenizer; pass tokenizer= to LLM, or {otherwise}"
            )
        return self.tokenizer

    def _check_ids(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        array = np.asarray(ids)
        if array.ndim != 1 or array.size == 0:
            raise ValueError(
                f"token ids must be one non-empty sequence, got shape {list(array.shape)}"
            )
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"token ids must be integers, got {array.dtype}")
        beyond = array[(array < 0) | (array >= self.config.vocab_size)]
        if beyond.size:
            raise ValueError(
                f"token ids {beyond[:5].tolist()} are outside the vocabulary of "
                f"{self.config.vocab_size}"
            )
        return array.astype(np.int32)

    def _check_length(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = self._check_ids(token_ids)
        if len(ids) > self.max_model_len:
            raise ValueError(f"{len(ids)} tokens are more than max_model_len={self.max_model_len}")
        return ids

    def _jobs(
        self,
        encoded: Sequence[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Job]:
        if sampling_params is None:
            sampling_params = self.default_sampling_params
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(encoded)
        if len(sampling_params) != len(encoded):
            raise ValueError(
                f"{len(encoded)} prompts but {len(sampling_params)} sampling_params; give one for "
                "all or one for each"
            )
        return [
            self._job(text, ids, params)
            for (text, ids), params in zip(encoded, sampling_params, strict=True)
        ]

    def _job(self, text: str | None, ids: Sequence[int], params: SamplingParams) -> Job:
        prompt = self._check_ids(ids)
        room = self.max_model_len - len(prompt)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, which leaves no room for output within "
                f"max_model_len={self.max_model_len}; shorten it or raise max_model_len"
            )
        params.check_vocabulary(self.config.vocab_size)
        bad_words: list[list[int]] = []
        if params.bad_words:
            tokenizer = self._require_tokenizer("leave bad_words out")
            bad_words = bad_word_ids(
                params.bad_words, lambda word: tokenizer.encode(word, add_special_tokens=False)
            )
        if params.stop:
            self._require_tokenizer("leave stop out")
        ordinal = next(self._ordinals)
        base = (self.seed, ordinal) if params.seed is None else (params.seed,)
        requests = [
            Request(
                prompt=prompt,
                params=params,
                seed=(*base, index),
                eos_ids=self.eos_token_ids,
                max_tokens=min(params.max_tokens or room, room),
                bad_words=tuple(map(tuple, bad_words)),
            )
            for index in range(params.n)
        ]
        return Job(str(ordinal), text, requests, self.tokenizer)

    # -- running them --------------------------------------------------------------------------

    def _complete(
        self,
        encoded: Sequence[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        jobs = self._jobs(encoded, sampling_params)
        requests = [request for job in jobs for request in job.requests]
        with progress_bar("Generating", len(requests), show=use_tqdm) as advance:
            for request in run_together(self._engines, requests):
                advance(1 if request.finish_reason else 0)
        return [job.output() for job in jobs]

    def _stream(self, job: Job) -> Iterator[RequestOutput]:
        for request in run_together(self._engines, job.requests):
            yield job.news(request)


def generate(
    model: "str | Path | LLM | None",
    prompts: Prompt | Sequence[Prompt],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    **llm_kwargs: Any,
) -> list[RequestOutput]:
    """`LLM(model, **llm_kwargs).generate(prompts, sampling_params)` in one call.

    Args:
        model: a checkpoint folder, an `LLM`, or None for the embedded demo model.
        prompts: as `LLM.generate`.
        sampling_params: as `LLM.generate`.
        llm_kwargs: of `LLM`; refused with an `LLM`.
    """
    if isinstance(model, LLM):
        if llm_kwargs:
            raise ValueError(f"{', '.join(llm_kwargs)} cannot be changed on a loaded LLM")
        return model.generate(prompts, sampling_params)
    with LLM(model, **llm_kwargs) as llm:
        return llm.generate(prompts, sampling_params)


def _say_compiling(name: str) -> contextlib.AbstractContextManager[None]:
    return waiting_for(f"Compiling {name} (kept for the next time)")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(choices)}")


def _tokenizer(folder: Path, given: Any | None, vocab_size: int) -> Any | None:
    if given is None:
        return load_tokenizer(folder, vocab_size)
    if not isinstance(given, str | Path):
        return given
    tokenizer = load_tokenizer(resolve(given, files=TOKENIZER_FILES), vocab_size)
    if tokenizer is None:
        raise ValueError(f"tokenizer={str(given)!r}: there are no tokenizer files in that folder")
    return tokenizer


def _eos_token_ids(
    checkpoint: Checkpoint, config: LlamaConfig, tokenizer: Any | None
) -> tuple[int, ...]:
    """generation_config.json's, which for Llama 3 has the whole set; else config.json's; else the
    tokenizer's."""
    ids = token_ids(
        checkpoint.generation_config,
        "eos_token_id",
        config.vocab_size,
        file="generation_config.json",
    )
    of_tokenizer = None if tokenizer is None else tokenizer.eos_token_id
    return ids or config.eos_token_ids or (() if of_tokenizer is None else (of_tokenizer,))


def _default_sampling_params(checkpoint: Checkpoint) -> SamplingParams:
    try:
        return SamplingParams.from_generation_config(
            checkpoint.generation_config, max_tokens=DEFAULT_MAX_TOKENS
        )
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder}/generation_config.json: {error}") from error


def _kv_cache_dtype(
    requested: str, dtype: jnp.dtype, quantization: Quantization | None
) -> jnp.dtype:
    if requested == "auto":
        declared = quantization is not None and quantization.kv_cache is not None
        requested = "fp8" if declared else dtype.name
    return jnp.dtype(jnp.float8_e4m3fn) if requested.startswith("fp8") else jnp.dtype(requested)


def _check_max_model_len(requested: int | None, config: LlamaConfig) -> None:
    if requested is not None and requested > config.max_model_len:
        raise ValueError(
            f"max_model_len={requested} is more than the model's {config.max_model_len}; its "
            "positions were trained (or scaled) to no more"
        )


def _max_model_len(requested: int | None, config: LlamaConfig, max_cache_tokens: int) -> int:
    """The user's wish, or the model's maximum, if a cache of that length fits into memory."""
    wanted = requested or config.max_model_len
    if wanted <= max_cache_tokens:
        return wanted
    if requested is not None or max_cache_tokens < 1:
        raise ValueError(
            f"a key-value cache of max_model_len={wanted} tokens does not fit into memory, "
            f"{max_cache_tokens} would; lower max_model_len, or use kv_cache_dtype='fp8'"
        )
    warnings.warn(
        f"max_model_len is lowered from the model's {wanted} to the {max_cache_tokens} tokens "
        "whose cache fits into memory",
        stacklevel=3,
    )
    return max_cache_tokens
