"""The scheduler on slots without a model: every request gets its own text, in turn, within
budgets."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_jax.errors import InputError
from plt_jax.serving.prefix_cache import PrefixCache
from plt_jax.serving.request import Finish, Request, SlotSampling
from plt_jax.serving.scheduler import QueueFullError, Scheduler
from tests.serving.fake_slots import Clock, FakeSlots, Recorder, continuation, run_to_end


def make(slots=2, context=40, chunk=4, most_waiting=1000, prefix_blocks=0, observer=None):
    model = FakeSlots(slots, context, chunk)
    cache = PrefixCache(chunk, 1, prefix_blocks)
    return model, Scheduler(model, cache, most_waiting, observer, Clock())


def request(prompt, new=5, seed=0, most=None, **settings):
    return Request(list(prompt), new, SlotSampling(seed=seed), Recorder(most), **settings)


class Watch:
    """An observer that keeps what it is told."""

    def __init__(self):
        self.events = Counter()
        self.cached = 0

    def admitted(self, queued, prompt_tokens, cached_tokens):
        assert queued >= 0
        self.events["admitted"] += 1
        self.cached += cached_tokens

    def first_token(self, since_arrival):
        assert since_arrival > 0
        self.events["first"] += 1

    def next_token(self, since_last):
        assert since_last > 0
        self.events["next"] += 1

    def finished(self, why):
        self.events[why] += 1


# Few tokens, so that prompts begin alike.
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=20)


@st.composite
def plans(draw):
    """What clients do: at which tick which request arrives, and when it is cancelled."""
    count = draw(st.integers(1, 12))
    return [
        {
            "at": draw(st.integers(0, 30)),
            "prompt": draw(prompts),
            "new": draw(st.integers(1, 12)),
            "seed": draw(st.integers(0, 3)),
            "stops": frozenset(draw(st.lists(st.integers(0, 96), max_size=8))),
            "most": draw(st.none() | st.integers(1, 6)),
            "cancel": draw(st.none() | st.integers(0, 40)),
        }
        for _ in range(count)
    ]


def expected(plan):
    """The tokens that a request gets if it is not cancelled, and why it ends."""
    tokens = continuation(plan["prompt"], plan["new"], plan["seed"])
    for count, token in enumerate(tokens):
        if token in plan["stops"]:
            return tokens[:count], Finish.STOP
        if count + 1 == plan["most"]:
            return tokens[: count + 1], Finish.STOP
    return tokens, Finish.LENGTH


@settings(max_examples=200)
@given(plans(), st.integers(1, 4), st.integers(1, 7), st.integers(0, 5))
def test_every_request_gets_its_own_text(plans, slots, chunk, prefix_blocks):
    watch = Watch()
    model, scheduler = make(slots, 40, chunk, prefix_blocks=prefix_blocks, observer=watch)
    requests = [
        request(plan["prompt"], plan["new"], plan["seed"], plan["most"], stop_tokens=plan["stops"])
        for plan in plans
    ]
    begun: list[int] = []
    for tick in range(1000):
        for index, plan in enumerate(plans):
            if plan["at"] == tick:
                scheduler.submit([requests[index]])
            if plan["cancel"] == tick:
                scheduler.cancel(requests[index])
        before = len(model.log)
        scheduler.tick()
        ran = model.log[before:]
        assert sum(tokens for kind, tokens in ran if kind == "prefill") <= chunk
        assert sum(kind == "step" for kind, _ in ran) <= 1
        assert scheduler.running <= slots
        now = [requests.index(run.request) for run in scheduler._running.values()]
        begun += [index for index in now if index not in begun]
        if tick > 45 and scheduler.is_idle:
            break
    assert scheduler.is_idle
    assert scheduler.running == scheduler.waiting == 0
    assert sorted(scheduler._free) == list(range(slots))
    for plan, one in zip(plans, requests, strict=True):
        listener = one.listener
        assert len(listener.ends) == 1
        tokens, why = expected(plan)
        if listener.ends == [Finish.CANCELLED]:
            assert plan["cancel"] is not None
            assert listener.ids == tokens[: len(listener.ids)]
        else:
            assert (listener.ids, listener.ends) == (tokens, [why])
    # Those that reached a slot did so in the order of their arrival.
    assert begun == sorted(begun, key=lambda index: (plans[index]["at"], index))
    assert sum(watch.events[why] for why in Finish) == len(plans)


def test_one_chunk_of_a_long_prompt_comes_between_two_steps():
    model, scheduler = make(slots=2, context=100, chunk=4)
    scheduler.submit([request([1], 60)])
    for _ in range(5):
        scheduler.tick()
    scheduler.submit([request([1] * 40, 5)])
    before = len(model.log)
    for _ in range(10):
        scheduler.tick()
    assert model.log[before:] == [("prefill", 4), ("step", 1)] * 9 + [("prefill", 4), ("step", 2)]


def test_short_prompts_share_a_budget():
    model, scheduler = make(slots=4, chunk=8)
    scheduler.submit([request([1] * size, 3) for size in (3, 4, 2, 8)])
    scheduler.tick()
    scheduler.tick()
    scheduler.tick()
    sizes = [entry for entry in model.log if entry[0] == "prefill"]
    assert sizes == [("prefill", 3), ("prefill", 4), ("prefill", 2), ("prefill", 8)]
    assert model.log.index(("prefill", 2)) > model.log.index(("step", 2))


def test_equal_beginnings_are_prefilled_once():
    watch = Watch()
    model, scheduler = make(slots=3, context=60, chunk=4, prefix_blocks=100, observer=watch)
    prompts = [[*range(10), last] for last in (1, 2, 3)]
    requests = [request(prompt) for prompt in prompts]
    scheduler.submit(requests)
    run_to_end(scheduler)
    for prompt, one in zip(prompts, requests, strict=True):
        assert one.listener.ids == continuation(prompt, 5)
    # The first one prefills 4 + 4 + 3 tokens, the others three each.
    assert sum(tokens for kind, tokens in model.log if kind == "prefill") == 11 + 3 + 3
    assert watch.cached == 16


def test_a_prompt_of_whole_blocks_keeps_a_token_for_its_logits():
    model, scheduler = make(slots=1, chunk=4, prefix_blocks=100)
    for _ in range(2):
        scheduler.submit([one := request(range(8))])
        run_to_end(scheduler)
        assert one.listener.ids == continuation(range(8), 5)
    assert [tokens for kind, tokens in model.log if kind == "prefill"] == [4, 4, 4]


def test_prompts_are_scored_in_chunks_and_not_from_the_cache():
    _, scheduler = make(slots=1, chunk=4, prefix_blocks=100)
    prompt = list(range(11, 21))
    for new in (0, 2):
        scheduler.submit([one := request(prompt, new, score_prompt=True)])
        run_to_end(scheduler)
        # The fake's score of a token is its number.
        assert [score.log for score in one.listener.scores] == prompt[1:]
        assert one.listener.ids == continuation(prompt, new)
        assert one.listener.ends == [Finish.LENGTH]


def test_a_prompt_of_one_token_has_no_scores():
    _, scheduler = make()
    scheduler.submit([one := request([3], 0, score_prompt=True)])
    run_to_end(scheduler)
    assert (one.listener.scores, one.listener.ends) == ([], [Finish.LENGTH])


def test_a_full_queue_refuses_all_of_a_batch():
    _, scheduler = make(slots=1, most_waiting=2)
    scheduler.submit([request([1]) for _ in range(3)])  # one of them gets the slot
    with pytest.raises(QueueFullError):
        scheduler.submit([request([1])])
    scheduler.tick()
    with pytest.raises(QueueFullError):
        scheduler.submit([request([1])])
    run_to_end(scheduler)
    with pytest.raises(QueueFullError):
        scheduler.submit([request([1]) for _ in range(4)])
    scheduler.submit([last := request([1])])
    run_to_end(scheduler)
    assert last.listener.ends == [Finish.LENGTH]


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        ([], 1, "the prompt is empty"),
        ([1] * 40, 1, "40 tokens and 1 new ones are asked for, but the context holds 40"),
        ([1], 0, "0 new tokens are asked for; ask for at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(prompt, new, message):
    _, scheduler = make()
    with pytest.raises(InputError, match=message):
        scheduler.submit([request(prompt, new)])
    assert scheduler.is_idle


def test_all_end_when_the_scheduler_does():
    _, scheduler = make(slots=1)
    requests = [request([1], 20) for _ in range(3)]
    scheduler.submit(requests)
    scheduler.tick()
    scheduler.end(Finish.SHUTDOWN)
    assert [one.listener.ends for one in requests] == [[Finish.SHUTDOWN]] * 3
    assert scheduler.is_idle


def test_logits_that_are_not_finite_fail_their_request_alone(monkeypatch):
    model, scheduler = make(slots=2)
    drawn = model._drawn

    def broken(tokens):
        made = drawn(tokens)
        if len(tokens) == 2:
            made.tokens_B[0] = -1
        return made

    monkeypatch.setattr(model, "_drawn", broken)
    requests = [request([1], 6), request([2], 6)]
    scheduler.submit(requests)
    run_to_end(scheduler)
    assert requests[0].listener.ends == [Finish.FAILED]
    assert requests[1].listener.ids == continuation([2], 6)


def test_a_listener_that_fails_ends_its_own_request_alone():
    class Failing(Recorder):
        def take(self, new):
            raise ValueError("no text")

    _, scheduler = make(slots=2)
    failing = Request([1], 5, SlotSampling(), Failing())
    scheduler.submit([failing, other := request([2])])
    run_to_end(scheduler)
    assert failing.listener.ends == [Finish.FAILED]
    assert other.listener.ids == continuation([2], 5)
