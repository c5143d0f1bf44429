"""What an answer cost: tokens, speeds, memory."""

from typing import TYPE_CHECKING

from qllama.cli.tables import in_units

if TYPE_CHECKING:
    from qllama.outputs import RequestMetrics


def speed_lines(metrics: "RequestMetrics", completions: int = 1) -> list[str]:
    """Prompt and decode speed and time to the first token, as lines of a report.

    The first tokens of `completions` come out of reading the prompt, so decoding is timed
    without them. On a first run the times include compiling.
    """
    first, last = metrics.first_token_time, metrics.last_token_time
    prompt, generated = metrics.num_prompt_tokens, metrics.num_generation_tokens
    begun = metrics.first_scheduled_time
    reading = None if first is None or begun is None else first - begun
    writing = None if first is None or last is None else last - first
    waited = metrics.time_to_first_token
    return [
        f"prompt       {prompt} tokens{_rate(prompt, reading)}",
        f"generation   {generated} tokens{_rate(generated - completions, writing)}",
        f"first token  {'never came' if waited is None else f'after {waited:.2f} s'}",
    ]


def memory_line() -> str:
    """The most memory that was in use."""
    import jax

    from qllama.device import peak_memory

    where = "of the GPU" if jax.default_backend() == "gpu" else "of the process"
    return f"peak memory  {in_units(peak_memory())} {where}"


def _rate(tokens: int, seconds: float | None) -> str:
    return f", {tokens / seconds:.1f} tokens/s" if tokens > 0 and seconds else ""
