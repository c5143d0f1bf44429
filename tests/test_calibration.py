"""Calibration data: the tokens that come out of files, lists and hubs, and what is refused."""

import hashlib
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_hub
import numpy as np
import pytest
from fake_hub import MODEL, Hub
from qllama_convert.names import linear_shapes
from quantize_cases import float_checkpoint, token_ids
from tokenizers import Tokenizer

import qllama
from qllama.config import LlamaConfig
from qllama.gptq.calibration import CalibrationData, load_calibration, shortage
from qllama.tokenizer import load_tokenizer

VOCABULARY = 768
TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife.\n"
CHAT = [{"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "Emma."}]

Load = Callable[..., CalibrationData]


@pytest.fixture(scope="module")
def folder(tiny_llama3: Callable[[str], Path]) -> Path:
    return tiny_llama3("ct_w4a16_g128")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Tokenizer:
    """The tokenizers library's own reading of the file."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def load(folder: Path) -> Load:
    """`load_calibration` with the tiny model's tokenizer; fewer samples than asked are fine."""
    tokenizer = load_tokenizer(folder)

    def load(dataset: Any, samples: int = 100, length: int = 32, **options: Any) -> CalibrationData:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* instead of the 100 asked for")
            return load_calibration(
                dataset,
                tokenizer,
                VOCABULARY,
                num_calibration_samples=samples,
                max_seq_length=length,
                **options,
            )

    return load


def ids(data: CalibrationData) -> list[list[int]]:
    assert all(sequence.dtype == np.int32 for sequence in data.sequences)
    return [sequence.tolist() for sequence in data.sequences]


# -- one text -------------------------------------------------------------------------------------


def test_a_text_is_tokenized_once_and_cut_in_order(
    load: Load, plain: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "novel.txt"
    file.write_text(TEXT * 400)
    whole = plain.encode(TEXT * 400, add_special_tokens=False).ids
    data = load(file, samples=7, length=30)
    assert ids(data) == [whole[30 * i : 30 * (i + 1)] for i in range(7)]
    assert data.tokens == 210
    assert data.source == str(file)


def test_no_more_of_a_text_is_read_than_needed_and_the_tokens_are_the_same(
    load: Load, plain: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "long.txt"
    # One token may be many bytes long: the first guess of how much to read is too small.
    text = ("— universally acknowledged " * 3 + "\n" + " " * 200) * 3000
    file.write_text(text)
    whole = plain.encode(text, add_special_tokens=False).ids
    data = load(file, samples=4, length=500)
    assert [t for sequence in ids(data) for t in sequence] == whole[:2000]


def test_a_short_text_ends_with_a_short_piece_and_a_warning(load: Load, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    with pytest.warns(UserWarning, match=r"gives 2 calibration sequences, (\d+) tokens, .* 9 "):
        data = load(file, samples=9, length=20)
    assert [len(sequence) for sequence in data.sequences] == [20, data.tokens - 20]
    file.write_text(TEXT)
    with pytest.warns(UserWarning, match="instead of"):
        assert ids(load(file, samples=9, length=20)) == ids(data)


# -- rows -----------------------------------------------------------------------------------------


def test_rows_of_a_file(load: Load, plain: Tokenizer, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": TEXT, "id": 1}, {"messages": CHAT}, {"text": "Emma"}, {"text": "unused"}]
    file.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    data = load(str(file), samples=3)
    expected = json.loads((folder / "tokenizer_config.json").read_text())
    assert expected["bos_token"] == "<|begin_of_text|>"
    text, chat, short = ids(data)
    assert text == plain.encode(TEXT).ids[:32]  # with BOS, as a prompt; truncated
    assert short == plain.encode("Emma").ids
    # Llama 3's template, as its model card spells it out.
    spelled = "<|begin_of_text|>" + "".join(
        f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>" for m in CHAT
    )
    assert chat == plain.encode(spelled, add_special_tokens=False).ids[:32]


def test_parquet(load: Load, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"text": f"{i} {TEXT}", "large": b"x" * 1000} for i in range(200)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    parquet.write_table(
        arrow.Table.from_pylist([{"prompt": "no", "messages": CHAT}]), tmp_path / "chat.parquet"
    )
    same = [{"text": row["text"]} for row in rows]
    assert ids(load(tmp_path / "rows.parquet", samples=150)) == ids(load(same, samples=150))
    assert ids(load(tmp_path / "chat.parquet")) == ids(load([{"messages": CHAT}]))

    parquet.write_table(arrow.Table.from_pylist([{"prompt": "no"}]), tmp_path / "no.parquet")
    with pytest.raises(ValueError, match=r"no.parquet, row 1: expected a key .* found 'prompt'$"):
        load(tmp_path / "no.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing else")
    with pytest.raises(ValueError, match="is no Parquet file that can be read"):
        load(tmp_path / "bad.parquet")


def test_parquet_without_pyarrow(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="needs pyarrow, which is not installed: pip install"):
        load(tmp_path / "rows.parquet")


def test_lists(load: Load, plain: Tokenizer) -> None:
    assert ids(load([TEXT, "Emma"])) == [plain.encode(TEXT).ids[:32], plain.encode("Emma").ids]
    # Ids are taken as they are, in any form of a list.
    assert ids(load([[1, 2, 3], (4,), np.arange(40)])) == [[1, 2, 3], [4], [*range(32)]]
    assert ids(load(np.arange(6).reshape(2, 3))) == [[0, 1, 2], [3, 4, 5]]


def test_empty_rows_are_left_out_with_a_warning(load: Load) -> None:
    with pytest.warns(UserWarning, match=r"3 calibration rows are empty .* first is dataset\[1\]"):
        data = load(["a", " \n", {"text": ""}, {"messages": []}, "b"])
    assert len(data.sequences) == 2


# -- random tokens --------------------------------------------------------------------------------


def test_random_tokens(load: Load, plain: Tokenizer) -> None:
    data = load("random-tokens", samples=40, length=1000)
    drawn = np.concatenate(data.sequences)
    counts = np.bincount(drawn, minlength=VOCABULARY)
    special = [token.content for token in plain.get_added_tokens_decoder().values()]
    assert len(special) > 3
    ordinary = [t for t in range(VOCABULARY) if plain.id_to_token(t) not in (None, *special)]
    assert np.flatnonzero(counts).tolist() == ordinary
    # Evenly: each count is binomial, and six standard deviations from its mean are a long way.
    mean = drawn.size / len(ordinary)
    assert np.abs(counts[ordinary] - mean).max() < 6 * mean**0.5

    assert load("random-tokens", samples=40, length=1000).digest() == data.digest()
    assert load("random-tokens", samples=40, length=1000, seed=1).digest() != data.digest()


def test_random_tokens_need_no_tokenizer() -> None:
    data = load_calibration("random-tokens", None, 5, num_calibration_samples=2, max_seq_length=50)
    assert {t for sequence in ids(data) for t in sequence} == {*range(5)}


def test_digest_is_of_lengths_and_ids(load: Load) -> None:
    data = load([[1, 2, 3], [4]])
    content = b"".join(
        len(s).to_bytes(8, "little") + b"".join(t.to_bytes(4, "little") for t in s)
        for s in [[1, 2, 3], [4]]
    )
    assert data.digest() == hashlib.sha256(content).hexdigest()
    assert load([[1, 2], [3, 4]]).digest() != data.digest()


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text"\n', "line 2: is no JSON: Expecting"),
        (b'{"text": "a"}\n\n{"text": "\xff"}\n', "line 3: is not UTF-8 text (byte 0xff); convert"),
        (b"[" * 100_000, "line 1: is no JSON"),
        (b'{"txt": "a", "n": 1}', "expected a key 'text' or 'messages', found 'txt', 'n'"),
        (b'{"text": null}', "expected a key 'text' or 'messages', found 'text'"),
        (b'{"text": 3}', "'text' must be a string, found int"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"messages": "hello"}', "'messages' must be a list, found str"),
        (b'{"messages": [3]}', "a message must be"),
        (b'{"messages": [{"role": "user", "content": "\\udc00"}]}', "half of a surrogate pair"),
        (b'["a", "b"]', "expected a text, a mapping with 'text' or 'messages', or token ids"),
        (b"[0, 768]", "token ids [768] are outside the vocabulary of 768"),
        (b"[-1, 5]", "token ids [-1] are outside the vocabulary of 768"),
        (b"3", "expected a text, a mapping"),
        (b"\n\n", "there is no text to calibrate with"),
    ],
)
def test_bad_rows(load: Load, tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load(file)
    assert str(caught.value).startswith(str(file))


def test_bad_text(load: Load, tmp_path: Path) -> None:
    file = tmp_path / "latin1.txt"
    file.write_bytes(b"fine\nna\xefve\n")
    with pytest.raises(ValueError, match=r"latin1.txt, line 2: is not UTF-8 text \(byte 0xef\)"):
        load(file)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="there is no text"):
        load(file)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (None, "no dataset is named: give a .txt, .jsonl or .parquet file, a Hub dataset such as"),
        ("missing.txt", "dataset 'missing.txt' is missing"),
        ("missing.parquet", "dataset 'missing.parquet' is missing"),
        ("wikitext", "dataset 'wikitext' does not exist; give"),
        (Path("some/where"), "dataset 'some/where' does not exist; give"),
        (".", "dataset '.' is a folder; give"),
        (__file__, "is not among the kinds of files that are read; give"),
        (7, "dataset is a int; give"),
        ([], "a list of 0 rows: there is no text"),
    ],
)
def test_bad_names(load: Load, dataset: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load(dataset)


def test_texts_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for dataset in (tmp_path / "a.txt", ["a"], [{"messages": CHAT}]):
        with pytest.raises(ValueError, match="the model folder has no tokenizer, which texts need"):
            load_calibration(dataset, None, 5)


@pytest.mark.parametrize("options", [{"samples": 0}, {"length": -1}, {"samples": 1.5}])
def test_bad_sizes(load: Load, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be a positive integer"):
        load("random-tokens", **options)


def test_shortage() -> None:
    assert shortage(4096, 1024) is None
    assert "4096 or more" in str(shortage(4095, 1024))
    assert "rounded to nearest" in str(shortage(100, 1024))


def test_a_run_tells_of_a_shortage(tmp_path: Path) -> None:
    model = float_checkpoint(tmp_path / "model")
    ids = token_ids()
    config = json.loads((model / "config.json").read_text())
    widest = 4 * max(k for _, k in linear_shapes(LlamaConfig.from_hf(config)).values())
    found = sum(map(len, ids))
    assert found < widest
    with pytest.warns(UserWarning, match="instead of the 512 asked for"):
        report = qllama.quantize(model, tmp_path / "out", dataset=ids, dry_run=True)
    (note,) = (note for note in report.notes if "few" in note)
    assert note.startswith(f"{found} calibration tokens are few for {widest // 4} input features")
    assert f"{widest} or more are enough" in note


# -- hubs -----------------------------------------------------------------------------------------

_SCRIPT = """
import json, sys
from pathlib import Path
from qllama.gptq.calibration import load_calibration
from qllama.tokenizer import load_tokenizer
folder, dataset, samples = json.loads(sys.argv[1])
try:
    data = load_calibration(
        dataset, load_tokenizer(Path(folder)), 768, num_calibration_samples=samples
    )
    print(json.dumps([sequence.tolist() for sequence in data.sequences]))
except ValueError as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {
        "README.md": b"# Texts",
        "data/train-00000-of-00002.jsonl": lines("one", "two"),
        "data/train-00001-of-00002.jsonl": lines("three", "four"),
        "data/test-00000-of-00001.jsonl": lines("no"),
    }
    with fake_hub.serve(files) as hub:
        yield hub


@pytest.fixture
def ask(hub: Hub, folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """What a dataset of the hub gives: token ids, or an error as text."""

    def ask(dataset: str, samples: int = 3, **environment: str) -> Any:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        own = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, json.dumps([str(folder), dataset, samples])],
            env=inherited | own | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


def test_a_hub_dataset(hub: Hub, ask: Callable[..., Any], plain: Tokenizer) -> None:
    one, two, three = (plain.encode(text).ids for text in ("one", "two", "three"))
    assert ask(MODEL, samples=2) == [one, two]
    assert hub.downloaded() == {"data/train-00000-of-00002.jsonl"}  # no more than needed
    assert ask(MODEL) == [one, two, three]
    assert ask(f"{MODEL}/data/te", samples=1) == [plain.encode("no").ids]
    hub.endpoint = "http://127.0.0.1:9"
    assert ask(MODEL, HF_HUB_OFFLINE="1") == [one, two, three]  # from the cache


def test_hub_datasets_that_cannot_be_had(hub: Hub, ask: Callable[..., Any]) -> None:
    hub.files["other/train.jsonl"] = b"{}"
    choices = f"choose one of {MODEL}/data/train-, {MODEL}/other/train"
    assert choices in ask(MODEL)
    assert "no .jsonl or .parquet file whose name begins with 'dat/'" in ask(f"{MODEL}/dat/")
    assert "no such file here and no such dataset on" in ask("Owner/absent")
    assert "HF_HUB_OFFLINE forbids" in ask(MODEL, HF_HUB_OFFLINE="1")


def test_files_that_the_hub_converted(hub: Hub, ask: Callable[..., Any], plain: Tokenizer) -> None:
    hub.files = {"texts.csv": b"text\none\n"}
    hub.branches = {"refs/convert/parquet": {"default/train/0000.jsonl": lines("one")}}
    assert ask(MODEL, samples=1) == [plain.encode("one").ids]
