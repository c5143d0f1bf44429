"""Is a checkpoint folder what its readers expect? All that is wrong with it, not the first thing.

Without loading a model: every tensor is read and checked as a load does it, then the folder is held
to the rules of vLLM, transformers and compressed-tensors, which refuse, or silently misread, what
breaks them. `against="transformers"` runs the checkpoint there and here, and compares logits.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qllama.config import LlamaConfig
from qllama.errors import CheckpointError
from qllama_convert.checkpoint import Checkpoint, CheckpointWarning, open_checkpoint
from qllama_convert.files import first_few
from qllama_convert.hub import resolve
from qllama_convert.kv_scales import read_kv_scales
from qllama_convert.linear import check_bias, read_linear
from qllama_convert.module_tensors import ModuleTensors
from qllama_convert.names import LM_HEAD, attention_paths, is_derived, linear_shapes, module_shapes
from qllama_convert.quantization_config import Quantization, parse_quantization
from qllama_convert.quantization_rules import Finding
from qllama_convert.reader_rules import reader_findings
from qllama_convert.verify_logits import LogitsComparison, compare_with_transformers

AGAINST = ("transformers",)
"""What `verify` can run a checkpoint against."""


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """What `verify` found."""

    folder: str
    problems: tuple[str, ...]  # why it does not load, and who else refuses or misreads it
    notes: tuple[str, ...]  # right, but not for every reader
    comparison: LogitsComparison | None  # None: not asked for, or it does not load

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and (self.comparison is None or self.comparison.ok)


def verify(
    path: str | Path,
    *,
    against: str | None = None,
    python: str | Path | None = None,
    revision: str | None = None,
) -> VerificationReport:
    """Check a checkpoint folder. Whatever is wrong with it is in the report, not raised.

    Args:
        path: the folder, or a Hub id, which is downloaded first.
        against: "transformers" to compare logits with; it computes in float32 on the CPU.
        python: an interpreter that has torch, transformers and compressed-tensors; None:
            `$QLLAMA_ORACLE_PYTHON`, else this one.
        revision: branch, tag or commit of a Hub id.

    Raises:
        ValueError: `against` or `python` names nothing that can be run.
        CheckpointError: there is no such folder and no such model.
    """
    if against is not None and against not in AGAINST:
        raise ValueError(f"against={against!r} is unknown; use {', '.join(AGAINST)}")
    folder = resolve(path, revision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)  # they become notes
        problems, findings, warned = _look_into(folder)
        loads = not problems
        problems += [finding.text for finding in findings if not finding.harmless]
        notes = warned + [finding.text for finding in findings if finding.harmless]
        comparison = None
        if against is not None and loads:
            comparison = compare_with_transformers(folder, python)
    return VerificationReport(
        folder=str(folder), problems=tuple(problems), notes=tuple(notes), comparison=comparison
    )


def _look_into(folder: Path) -> tuple[list[str], list[Finding], list[str]]:
    """What a load stumbles on; what other readers would; and what a load warns of."""
    try:
        with open_checkpoint(folder) as checkpoint:
            llama = LlamaConfig.from_hf(checkpoint.config)
            quantization = parse_quantization(checkpoint, linear_shapes(llama))
            problems = [*_problems_of_tensors(checkpoint, llama, quantization)]
            findings = [*reader_findings(checkpoint, llama, quantization)]
            return problems, findings, list(checkpoint.warnings)
    except CheckpointError as error:
        return [str(error)], [], []


def _problems_of_tensors(
    checkpoint: Checkpoint, llama: LlamaConfig, quantization: Quantization | None
) -> Iterator[str]:
    linears = linear_shapes(llama)
    for path, shape in module_shapes(llama).items():
        tensors = ModuleTensors(checkpoint, path)
        if path == LM_HEAD and llama.tie_word_embeddings and not tensors.suffixes:
            continue
        try:
            if path in linears:
                linear = read_linear(checkpoint, quantization, path, linears[path])
                check_bias(checkpoint, llama, path, linear)
            else:
                tensors.read_floats("weight", shape)
        except CheckpointError as error:
            yield str(error)
            for suffix in tensors.suffixes:  # said once is enough
                tensors.ignore(suffix)
    for path in attention_paths(llama):
        try:
            read_kv_scales(checkpoint, quantization, path, llama.num_key_value_heads)
        except CheckpointError as error:
            yield str(error)
    unread = [name for name in checkpoint.unread() if not is_derived(name)]
    if unread:
        yield f"{len(unread)} tensors belong to no module of this Llama: {first_few(unread)}"
