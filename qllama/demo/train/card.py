"""The model card of a trained demo model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

from qllama.demo.train.settings import Settings


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What the card says beyond the config."""

    settings: Settings
    novels: Sequence[str]  # names of the texts trained on
    validation: str  # name of the text validated on
    train_tokens: int
    validation_tokens: int  # in whole windows of `settings.length`
    seconds: float  # of training
    device: str
    perplexity: float  # of the validation text, weights in bfloat16
    perplexity_w4a16: float  # the same with the stored weights


def model_card(config: Mapping[str, Any], parameters: int, facts: TrainingFacts) -> str:
    """The README.md of the folder, in Markdown with the Hub's header."""
    settings = facts.settings
    epochs = settings.steps * settings.batch * settings.length / facts.train_tokens
    return _CARD.substitute(
        config,
        parameters=f"{parameters / 1e6:.1f}",
        novels=", ".join(facts.novels),
        validation=facts.validation,
        train_tokens=f"{facts.train_tokens:,}",
        validation_tokens=f"{facts.validation_tokens:,}",
        steps=f"{settings.steps:,}",
        batch=settings.batch,
        epochs=f"{epochs:.0f}",
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        dropout=settings.dropout,
        rounding=f"{settings.rounding:.0%}",
        seed=settings.seed,
        seconds=f"{facts.seconds:.0f}",
        device=facts.device,
        perplexity=f"{facts.perplexity:.2f}",
        perplexity_w4a16=f"{facts.perplexity_w4a16:.2f}",
    )


_CARD = Template("""\
---
license: apache-2.0
language: en
library_name: qllama
pipeline_tag: text-generation
tags: [llama, compressed-tensors, w4a16]
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
| weights | W4A16: Linears int4 in groups of 128, symmetric, rounded to nearest; embedding and \
norms bfloat16; compressed-tensors, `pack-quantized` |

## Perplexity

| $validation, not trained on | per token |
| --- | --- |
| bfloat16 weights | $perplexity |
| **W4A16, as stored** | **$perplexity_w4a16** |

Paragraphs joined by empty lines, headings left out, tokenized without special tokens and cut into
consecutive windows of $max_position_embeddings tokens, each run alone: $validation_tokens tokens,
float32 compute. The same text was used to choose weight decay, dropout and when to stop.

## Training

- Texts: $novels:
  $train_tokens tokens. Lines of a paragraph are joined; headings and marks of emphasis are left
  out. One sequence in eight shows the paragraphs as turns of a chat, so the chat template works;
  what is answered is the next paragraph of a novel.
- $steps steps of $batch sequences, about $epochs passes over the texts. AdamW, learning rate
  $learning_rate with warm-up and cosine decay, weight decay $weight_decay, dropout $dropout on what
  each block adds to the residual stream, gradients clipped to norm 1, seed $seed.
- In the last $rounding of the steps the weights were rounded to W4A16 in the forward pass
  (straight-through estimator). Kept is the state with the lowest validation loss after rounding.
- $seconds seconds on one $device, compilation included.

Made by `python -m qllama.demo.train --text DIR --out DIR`.

## Use

    from qllama import LLM

    llm = LLM()  # this model
    for part in llm.stream("It is a truth"):
        print(part.outputs[0].text, end="", flush=True)

Sampling defaults are in `generation_config.json`. A text starts best where a paragraph would.

## Licence

The novels are in the public domain. Weights and tokenizer: Apache-2.0.
""")
