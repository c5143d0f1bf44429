"""Arguments that several verbs share, and what they become: arguments of `LLM`, sampling."""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qllama.engine.sampling_params import SamplingParams
    from qllama.llm import LLM

_UNSET = argparse.SUPPRESS  # the attribute exists just when the user gave the flag


def add_model(parser: argparse.ArgumentParser) -> None:
    """The positional MODEL, and its --revision."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a checkpoint folder, or a Hub id such as RedHatAI/Meta-Llama-3-8B-Instruct-FP8 "
        "(default: the embedded demo model)",
    )
    parser.add_argument(
        "--revision", metavar="REF", help="branch, tag or commit of a Hub id (default: main)"
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded and run, with vLLM's names."""
    group = parser.add_argument_group("loading and running")
    group.add_argument(
        "--max-model-len",
        type=int,
        default=_UNSET,
        metavar="N",
        help="tokens of prompt and output together (default: as many as the model takes and fit)",
    )
    group.add_argument(
        "--dtype",
        default=_UNSET,
        help="to compute in: bfloat16, float16 or float32 (default: auto, the checkpoint's on a "
        "GPU, float32 on a CPU)",
    )
    group.add_argument(
        "--kv-cache-dtype",
        default=_UNSET,
        metavar="DTYPE",
        help="of the key-value cache: fp8 or a dtype (default: auto, as the checkpoint says)",
    )
    group.add_argument(
        "--backend",
        default=_UNSET,
        help="of quantized products: xla, reference or pallas (default: auto, the fastest here)",
    )
    group.add_argument(
        "--activation-semantics",
        default=_UNSET,
        metavar="WHOSE",
        help="compressed-tensors: round activations as that library simulates it (default: vllm)",
    )
    group.add_argument(
        "-tp",
        "--tensor-parallel-size",
        type=int,
        default=_UNSET,
        metavar="N",
        help="devices that each weight is split over (default: 1)",
    )
    group.add_argument(
        "-dp",
        "--data-parallel-size",
        type=int,
        default=_UNSET,
        metavar="N",
        help="replicas of the model that share a batch, each on devices of its own (default: 1)",
    )


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """How this process finds the others of its run, where there are several."""
    group = parser.add_argument_group(
        "several processes",
        "Start the same command in every process, on one host or many; process 0 talks.",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="the address where process 0 listens"
    )
    group.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="find all that in the environment of SLURM or Open MPI",
    )
    group.add_argument(
        "--initialization-timeout",
        type=float,
        metavar="SECONDS",
        help="how long to wait until all of them are there (default: 300)",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen; flags that are left out are generation_config.json's business."""
    group = parser.add_argument_group(
        "sampling", "What is left out is taken from the checkpoint's generation_config.json."
    )
    group.add_argument(
        "-m",
        "--max-tokens",
        type=int,
        default=_UNSET,
        metavar="N",
        help="tokens to generate at most (default: 256 if the checkpoint does not say)",
    )
    group.add_argument(
        "--temp",
        "--temperature",
        type=float,
        default=_UNSET,
        dest="temperature",
        metavar="T",
        help="how freely to choose; 0 takes the most likely token",
    )
    for name, kind, what in (
        ("top-p", float, "choose among the likeliest tokens that have this probability together"),
        ("top-k", int, "choose among this many likeliest tokens"),
        ("min-p", float, "choose among tokens at least this likely relative to the likeliest"),
        ("presence-penalty", float, "make tokens that are in the output less likely"),
        ("frequency-penalty", float, "make tokens less likely each time they are in the output"),
        ("repetition-penalty", float, "above 1: make tokens of prompt and output less likely"),
        ("seed", int, "another text for another number (default: 0); the same for the same"),
    ):
        group.add_argument(f"--{name}", type=kind, default=_UNSET, metavar="X", help=what)
    group.add_argument(
        "--stop",
        action="append",
        default=_UNSET,
        metavar="TEXT",
        help="end before this text; may be given several times",
    )


def load_llm(args: argparse.Namespace) -> "LLM":
    """The `LLM` that the arguments of `add_model` and `add_engine_options` ask for."""
    from qllama.llm import LLM

    names = (
        "max_model_len",
        "dtype",
        "kv_cache_dtype",
        "backend",
        "activation_semantics",
        "tensor_parallel_size",
        "data_parallel_size",
    )
    return LLM(args.model, revision=args.revision, **_given(args, names))


def sampling_params(args: argparse.Namespace, llm: "LLM", **others: Any) -> "SamplingParams":
    """The checkpoint's defaults, changed by the arguments of `add_sampling_options`."""
    names = [field.name for field in dataclasses.fields(llm.default_sampling_params)]
    return dataclasses.replace(llm.default_sampling_params, **_given(args, names), **others)


def _given(args: argparse.Namespace, names: Any) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if hasattr(args, name)}
