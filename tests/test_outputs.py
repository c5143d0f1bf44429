"""What a request gives back."""

from qllama.outputs import CompletionOutput, RequestMetrics, RequestOutput


def test_a_completion_is_finished_when_it_has_a_reason():
    assert not CompletionOutput(index=0, text="a", token_ids=[1]).finished()
    assert CompletionOutput(index=0, text="a", token_ids=[1], finish_reason="length").finished()


def test_intervals_are_none_until_they_end():
    metrics = RequestMetrics(arrival_time=10.0)
    assert metrics.time_in_queue is None
    assert metrics.time_to_first_token is None
    metrics.first_scheduled_time, metrics.first_token_time = 10.5, 12.0
    assert metrics.time_in_queue == 0.5
    assert metrics.time_to_first_token == 2.0


def test_cached_tokens_are_those_of_the_metrics():
    output = RequestOutput("0", "p", [1, 2], None, [], finished=False)
    assert output.num_cached_tokens is None
    output.metrics = RequestMetrics(arrival_time=0.0, num_cached_tokens=64)
    assert output.num_cached_tokens == 64
