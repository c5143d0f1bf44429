"""The one error type a user of checkpoints has to know."""


class CheckpointError(ValueError):
    """A checkpoint folder cannot be used as it is.

    Raised for anything wrong with its files: config, index, tensors, tokenizer. The message
    names the file or tensor, says what was found and expected, and what to do about it.
    """
