"""benchmarks/bench_all_reduce.py in its tiny form: XLA's sums over simulated devices."""

import bench_scripts

bench_all_reduce = bench_scripts.load("bench_all_reduce")


def test_one_record_for_each_number_of_rows() -> None:
    records = list(bench_all_reduce.measure("psum", [1, 4], 1024, size=2, repeat=2))
    assert [record["m"] for record in records] == [1, 4]
    for record in records:
        assert record["implementation"] == "psum"
        assert record["devices"] == 2
        assert record["value"] > 0
        # 64 times two roundings to bfloat16, and each time one of a mean that is there already.
        assert record["max_rel_error"] < 0.02
