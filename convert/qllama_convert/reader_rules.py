"""The rules of those who read checkpoints: vLLM, transformers and compressed-tensors.

A checkpoint that qllama loads may still be refused by them, or, worse, misread without a word.
Each finding says who breaks. Source: the readers' code (vLLM 0.33, transformers 4.57 and 5.23,
compressed-tensors 0.19 and 0.20).
"""

from collections.abc import Iterator

import numpy as np

from qllama.config import LlamaConfig
from qllama.errors import CheckpointError
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.files import first_few, read_json
from qllama_convert.names import EMBED_TOKENS, LM_HEAD, split_name
from qllama_convert.quantization_config import Quantization
from qllama_convert.quantization_rules import Finding, quantization_findings
from qllama_convert.weight_files import INDEX, ORBAX, WEIGHTS


def reader_findings(
    checkpoint: Checkpoint, llama: LlamaConfig, quantization: Quantization | None
) -> Iterator[Finding]:
    """What readers would stumble on in a checkpoint that qllama loads."""
    yield from _of_config(checkpoint)
    yield from _of_head(checkpoint, llama)
    if quantization is not None:
        yield from quantization_findings(checkpoint, llama, quantization)
    yield from _of_tokenizer(checkpoint, llama)
    yield from _of_weight_files(checkpoint)


def _of_config(checkpoint: Checkpoint) -> Iterator[Finding]:
    config = checkpoint.config
    names = config.get("architectures")
    if not isinstance(names, list) or "LlamaForCausalLM" not in names:
        yield Finding(
            f"config.json: architectures is {names!r}, by which vLLM finds no model; it must be "
            '["LlamaForCausalLM"]'
        )
    if "torch_dtype" not in config:
        yield Finding("config.json: has no torch_dtype, where transformers 4 looks for it", True)
    if "rope_parameters" in config and config.get("rope_theta") is None:
        yield Finding(
            "config.json: has rope_parameters alone; transformers 4 reads rope_theta and "
            "rope_scaling, and would rotate by its defaults",
            True,
        )
    if not (checkpoint.folder / "generation_config.json").is_file():
        yield Finding(
            "there is no generation_config.json: readers end texts at config.json's eos_token_id "
            "and sample by their own defaults",
            True,
        )


def _of_head(checkpoint: Checkpoint, llama: LlamaConfig) -> Iterator[Finding]:
    head = f"{LM_HEAD}.weight"
    if not llama.tie_word_embeddings or not any(
        split_name(name)[0] == LM_HEAD for name in checkpoint.tensors
    ):
        return
    embedding = f"{EMBED_TOKENS}.weight"
    same = {head, embedding} <= checkpoint.tensors.keys() and np.array_equal(
        checkpoint.read(head), checkpoint.read(embedding)
    )
    if same:
        yield Finding(f"{head} is a copy of the embedding, which it is tied to", True)
    else:
        yield Finding(
            f"{LM_HEAD} is stored and differs from the embedding, but config.json ties them: vLLM "
            "and transformers use the embedding; set tie_word_embeddings to false"
        )


def _of_tokenizer(checkpoint: Checkpoint, llama: LlamaConfig) -> Iterator[Finding]:
    folder = checkpoint.folder
    names = ("tokenizer.json", "tokenizer.model")
    if not any((folder / name).is_file() for name in names):
        yield Finding(f"there is no tokenizer ({' or '.join(names)}); vLLM does not start without")
        return
    if not (folder / "tokenizer_config.json").is_file():
        yield Finding("there is no tokenizer_config.json, which names BOS, EOS and template", True)
    if not (folder / "tokenizer.json").is_file():
        return
    try:
        tokens = read_json(folder / "tokenizer.json").get("added_tokens")
        ids = [token["id"] for token in tokens or []]
        beyond = [str(i) for i in ids if i >= llama.vocab_size]
    except CheckpointError as error:
        yield Finding(str(error))
    except (TypeError, KeyError):
        yield Finding("tokenizer.json: added_tokens is no list of tokens with ids")
    else:
        if beyond:
            yield Finding(
                f"tokenizer.json: tokens {first_few(beyond)} are beyond the {llama.vocab_size} of "
                "the model"
            )


def _of_weight_files(checkpoint: Checkpoint) -> Iterator[Finding]:
    files = {info.file for info in checkpoint.tensors.values()}
    if files == {ORBAX}:
        return
    untold = [n for n, data in checkpoint.metadata.items() if data and "format" not in data]
    if untold:
        yield Finding(
            f"{first_few(untold)}: metadata without 'format', which transformers 4 refuses", True
        )
    if not (checkpoint.folder / INDEX).is_file():
        if files != {WEIGHTS}:
            yield Finding(
                f"weights are in {first_few(files)}; transformers looks for {WEIGHTS} or {INDEX}",
                True,
            )
        return
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    metadata = read_json(checkpoint.folder / INDEX).get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if stated != total:
        yield Finding(f"{INDEX}: total_size is {stated}, but the tensors take {total} bytes", True)
    shards: dict[str, set[str]] = {}
    for name, info in checkpoint.tensors.items():
        shards.setdefault(split_name(name)[0], set()).add(info.file)
    split = [module for module, names in shards.items() if len(names) > 1]
    if split:
        yield Finding(f"{len(split)} modules lie in several shards: {first_few(split)}", True)
