"""Sequences equal single steps, episode starts inside included."""

import pytest
import torch

from policies.memory import make_memory

CASES = {
    "gru": {"kind": "gru"},
    "gru of two layers": {"kind": "gru", "layers": 2},
    "lstm": {"kind": "lstm"},
    "lstm of two layers": {"kind": "lstm", "layers": 2},
    "stack of four": {"kind": "frame_stack"},
    "stack of two": {"kind": "frame_stack", "frames": 2},
    "none": {"kind": "none"},
}
STEPS, BATCH, INPUTS = 13, 5, 7


def make(case):
    torch.manual_seed(0)
    return make_memory(inputs=INPUTS, features=6, **CASES[case])


def by_steps(memory, x, state, starts):
    outputs = []
    for t in range(len(x)):
        output, state = memory.step(x[t], state, starts[t])
        outputs.append(output)
    return torch.stack(outputs), state


def patterns():
    generator = torch.Generator().manual_seed(3)
    yield "never", torch.zeros(STEPS, BATCH, dtype=torch.bool)
    yield "always", torch.ones(STEPS, BATCH, dtype=torch.bool)
    yield "first", torch.zeros(STEPS, BATCH, dtype=torch.bool).index_fill_(0, torch.tensor(0), True)
    yield "last", torch.zeros(STEPS, BATCH, dtype=torch.bool).index_fill_(0, torch.tensor(STEPS - 1), True)
    yield "often", torch.rand(STEPS, BATCH, generator=generator) < 0.4
    yield "seldom", torch.rand(STEPS, BATCH, generator=generator) < 0.08
    one = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    one[4, 2] = True
    yield "once", one


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("pattern", "starts"), [pytest.param(*p, id=p[0]) for p in patterns()])
def test_a_sequence_equals_its_steps(case, pattern, starts):
    memory = make(case)
    x = torch.randn(STEPS, BATCH, INPUTS)
    state = torch.randn(BATCH, *memory.shape)
    expected, _ = by_steps(memory, x, state, starts)
    torch.testing.assert_close(memory.sequence(x, state, starts), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_a_sequence_equal_those_of_its_steps(case):
    memory = make(case)
    x = torch.randn(STEPS, BATCH, INPUTS, requires_grad=True)
    state = torch.randn(BATCH, *memory.shape)
    starts = dict(patterns())["often"]
    weights = torch.randn(STEPS, BATCH, 6)
    gradients = [
        torch.autograd.grad((outputs * weights).sum(), [x, *memory.parameters()])
        for outputs in (memory.sequence(x, state, starts), by_steps(memory, x, state, starts)[0])
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_an_episode_start_forgets_everything_before(case):
    memory = make(case)
    x = torch.randn(BATCH, INPUTS)
    starts = torch.ones(BATCH, dtype=torch.bool)
    after_much, state = memory.step(x, torch.randn(BATCH, *memory.shape), starts)
    after_nothing, fresh = memory.step(x, torch.zeros(BATCH, *memory.shape), starts)
    torch.testing.assert_close(after_much, after_nothing)
    torch.testing.assert_close(state, fresh)
    assert state.shape == (BATCH, *memory.shape)


def test_a_frame_stack_sees_exactly_its_frames():
    memory = make("stack of four")
    x = torch.randn(STEPS, 1, INPUTS, requires_grad=True)
    starts = torch.zeros(STEPS, 1, dtype=torch.bool)
    starts[0] = starts[8] = True
    output = memory.sequence(x, torch.zeros(1, *memory.shape), starts)
    seen = []
    for t in range(STEPS):
        (gradient,) = torch.autograd.grad(output[t].sum(), x, retain_graph=True)
        seen.append(gradient.abs().sum((1, 2)).nonzero()[:, 0].tolist())
    assert seen[3] == [0, 1, 2, 3]
    assert seen[7] == [4, 5, 6, 7]
    assert seen[8] == [8]
    assert seen[10] == [8, 9, 10]


@pytest.mark.parametrize(
    "wrong", [{"kind": "rnn"}, {"kind": "gru", "layers": 0}, {"kind": "none", "features": 0}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="memory"):
        make_memory(**{"inputs": 3, "features": 4, **wrong})
