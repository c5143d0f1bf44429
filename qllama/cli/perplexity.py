"""`qllama perplexity`: how well a model predicts a text."""

import argparse
import dataclasses
import json

from qllama.cli.options import add_engine_options, add_model, load_llm
from qllama.cli.texts import add_text, default_window, read_file

SUMMARY = "measure how well a model predicts a text"


def configure_parser(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_text(parser)
    add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    from qllama.evaluate.perplexity import perplexity

    text = read_file(args.text)
    llm = load_llm(args)
    window = default_window(llm) if args.window is None else args.window
    result = perplexity(llm, text, window=window, limit=args.limit)
    if args.json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    print(f"perplexity  {result.perplexity:.4f}")
    print(f"mean NLL    {result.mean_nll:.6f} nats a token")
    print(f"measured    {result.protocol}")
