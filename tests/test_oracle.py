"""The way to the oracle: arrays travel there and back, and failures say why."""

import ml_dtypes
import numpy as np
import oracle
import pytest

pytestmark = pytest.mark.oracle


def test_torch_computes_what_numpy_computes() -> None:
    left = np.arange(6, dtype=np.float64).reshape(2, 3)
    right = np.arange(12, dtype=np.float64).reshape(3, 4)
    out = oracle.run(
        """
        out["product"] = (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()
        out["names"] = np.array(sorted(arrays))
        """,
        left=left,
        right=right,
    )
    np.testing.assert_array_equal(out["product"], left @ right)
    assert out["names"].tolist() == ["left", "right"]


def test_float8_rounds_to_nearest_even_in_both_worlds() -> None:
    values = np.linspace(-448, 448, 4001, dtype=np.float32)
    out = oracle.run(
        'out["codes"] = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()',
        values=values,
    )
    ours = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(out["codes"], ours)


def test_the_oracle_has_the_libraries_it_stands_for() -> None:
    out = oracle.run(
        """
        import compressed_tensors, transformers
        out["versions"] = np.array([transformers.__version__, compressed_tensors.__version__])
        """
    )
    transformers, compressed_tensors = out["versions"]
    assert transformers.startswith("5.")
    assert compressed_tensors.startswith("0.")


def test_a_failing_script_fails_the_test_with_its_stderr() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"ended with 1:(?s:.*)KeyError: 'nowhere'"):
        oracle.run('arrays["nowhere"]')


def test_a_script_that_hangs_is_stopped() -> None:
    with pytest.raises(pytest.fail.Exception, match="longer than"):
        oracle.run("import time; time.sleep(60)", timeout=0.5)


def test_no_interpreter_skips_and_a_wrong_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLLAMA_ORACLE_PYTHON", "no/such/python")
    with pytest.raises(pytest.fail.Exception, match="no/such/python does not exist"):
        oracle.interpreter()
    monkeypatch.delenv("QLLAMA_ORACLE_PYTHON")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="make oracle"):
        oracle.interpreter()
