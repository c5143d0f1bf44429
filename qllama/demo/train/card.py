"""The model card of the demo model."""

from collections.abc import Mapping
from string import Template
from typing import Any

from qllama.demo.train.facts import QuantizationFacts, TrainingFacts


def model_card(
    config: Mapping[str, Any],
    parameters: int,
    training: TrainingFacts,
    quantized: QuantizationFacts,
) -> str:
    """The README.md of the folder, in Markdown with the Hub's header."""
    settings = training.settings
    epochs = settings.steps * settings.batch * settings.length / training.train_tokens
    return _CARD.substitute(
        config,
        parameters=f"{parameters / 1e6:.1f}",
        novels=", ".join(training.novels),
        validation=training.validation,
        train_tokens=f"{training.train_tokens:,}",
        steps=f"{settings.steps:,}",
        batch=settings.batch,
        length=settings.length,
        epochs=f"{epochs:.0f}",
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        dropout=settings.dropout,
        seed=settings.seed,
        seconds=f"{training.seconds:.0f}",
        device=training.device,
        sequences=quantized.sequences,
        calibration_tokens=f"{quantized.tokens:,}",
        validation_windows=quantized.validation_windows,
        validation_tokens=f"{quantized.validation_tokens:,}",
        bfloat16=f"{quantized.bfloat16:.2f}",
        rounded=f"{quantized.rounded:.2f}",
        gptq=f"{quantized.gptq:.2f}",
    )


_CARD = Template("""\
---
license: apache-2.0
language: en
library_name: qllama
pipeline_tag: text-generation
tags: [llama, compressed-tensors, w4a16, gptq]
---

# The demo model of qllama

A Llama of $parameters million parameters that writes English prose in the manner of Jane Austen.
It was trained from nothing so that qllama can show, without a download, what it does: everything
about it but its size is that of a quantized Llama 3 checkpoint. It knows nothing, follows no
instructions and says nothing true; do not use it for anything but trying out software.

| | |
| --- | --- |
| architecture | `LlamaForCausalLM`: $num_hidden_layers layers, hidden $hidden_size, intermediate \
$intermediate_size, $num_attention_heads heads of $head_dim, $num_key_value_heads key-value heads, \
tied embeddings, rotary embedding of type `llama3` |
| tokenizer | byte-level BPE, $vocab_size tokens, trained on the same texts; Llama 3's split \
pattern, special tokens and chat template |
| context | $max_position_embeddings tokens, all of them trained |
| weights | W4A16: Linears int4 in groups of 128, symmetric, by GPTQ; embedding and norms \
bfloat16; compressed-tensors, `pack-quantized` |

## Perplexity

| $validation, not trained on | per token |
| --- | --- |
| bfloat16, as trained | $bfloat16 |
| W4A16, rounded to nearest | $rounded |
| **GPTQ W4A16, as stored** | **$gptq** |

Paragraphs joined by empty lines, headings left out, tokenized without special tokens and cut into
$validation_windows consecutive windows of $length tokens, each run alone and predicting all its
tokens but the first: $validation_tokens tokens, float32 compute. The same text was used to choose
weight decay, dropout and when to stop.

## Training

- Texts: $novels:
  $train_tokens tokens. Lines of a paragraph are joined; headings and marks of emphasis are left
  out. One sequence in eight shows the paragraphs as turns of a chat, so the chat template works;
  what is answered is the next paragraph of a novel.
- $steps steps of $batch sequences, about $epochs passes over the texts. AdamW, learning rate
  $learning_rate with warm-up and cosine decay, weight decay $weight_decay, dropout $dropout on what
  each block adds to the residual stream, gradients clipped to norm 1, seed $seed. Kept is the state
  with the lowest validation loss.
- $seconds seconds on one $device, compilation included.

## Quantization

`qllama.quantize` with scheme W4A16: GPTQ with activation order, each Linear calibrated on what the
quantized ones before it make. Calibration data: $sequences sequences of $length tokens, drawn from
the novels as those for training were, $calibration_tokens tokens in all; nothing of
$validation.

Trained and quantized by `python -m qllama.demo.train --text DIR --out DIR`.

## Use

    from qllama import LLM

    llm = LLM()  # this model
    for part in llm.stream("It is a truth"):
        print(part.outputs[0].text, end="", flush=True)

Sampling defaults are in `generation_config.json`. A text starts best where a paragraph would.

## Licence

The novels are in the public domain. Weights and tokenizer: Apache-2.0.
""")
