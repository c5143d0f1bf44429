"""What the demo model is and how it is trained, where nobody asks for anything else."""

from dataclasses import dataclass
from typing import Any

ARCHITECTURE: dict[str, Any] = {  # of config.json, but for what the tokenizer decides
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    # Llama 3.1's kind of rotary embedding at this size. Nothing is stretched after the fact: the
    # model is trained with it, at every position it is declared for.
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the model is trained. Two runs with equal settings and texts do the same."""

    steps: int = 1200
    batch: int = 16  # sequences a step
    length: int = 1024  # tokens a sequence; becomes max_position_embeddings
    vocab_size: int = 4096
    learning_rate: float = 1e-3  # at its peak, after `warmup` of the steps; cosine to a tenth
    warmup: float = 0.05
    weight_decay: float = 2.0  # and dropout: found by comparing validation losses
    dropout: float = 0.4
    evaluate_every: int = 100
    seed: int = 0


CALIBRATION_SEQUENCES = 256
"""Of `Settings.length` tokens, for GPTQ: 256 times as many tokens as any Linear has inputs."""
