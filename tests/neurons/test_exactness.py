"""merged = stepped = binary = phase, exactly, for every neuron, train, bits, steps and type.

And both drives of the membrane agree with it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from spikellm.neurons import (
    SoftResetNeuron,
    make_neuron,
    neurons,
    price_misfit,
    with_price,
    with_train,
)
from spikellm.neurons.base import keeps
from spikellm.neurons.phase import places

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NEURONS = st.one_of(
    st.just(("if", 1)),
    st.sampled_from([("ternary", 2), ("elastic", 2), ("elastic-published", 2)]),
    st.integers(1, 8).map(lambda bits: ("gif", bits)),
)

PRICES = st.one_of(
    st.just(0.0), st.integers(0, 40).map(lambda n: n / 4), st.floats(0, 2000, width=32)
)


@st.composite
def cases(
    draw: st.DrawFn,
) -> tuple[SoftResetNeuron, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | int]:
    """Neuron, current, threshold, baseline, steps.

    Ties, the top code, zeros and values out of range are likely.
    """
    neuron = with_train(
        make_neuron(*draw(NEURONS)),
        draw(st.sampled_from(["centered", "published"])),
        draw(st.sampled_from(["binary", "signed-digit"])),
    )
    if price_misfit(neuron) is None:
        form = draw(st.sampled_from(["binary", "phase"]))
        neuron = with_price(neuron, draw(PRICES), form)
    dtype = draw(st.sampled_from(DTYPES))
    channels = draw(st.integers(1, 9))
    per_channel = draw(st.booleans())
    steps: torch.Tensor | int = (
        torch.tensor(draw(st.lists(st.integers(1, 5), min_size=channels, max_size=channels)))
        if per_channel
        else draw(st.integers(1, 7))
    )
    theta = torch.tensor(draw(st.sampled_from([1.0, 0.5, 0.1, 3.0, 2.0**-20, 1e4])), dtype=dtype)
    top = neuron.levels * 7
    units = draw(
        st.lists(
            st.one_of(
                st.integers(-2 * top, 2 * top).map(lambda n: n / 2),
                st.floats(-top * 1.5, top * 1.5, width=32),
            ),
            min_size=channels,
            max_size=channels,
        )
    )
    current = (torch.tensor(units, dtype=torch.float32) * theta.float()).to(dtype)
    least = torch.as_tensor(steps).min() * neuron.levels  # a centered neuron rests in its range
    most = int(least) if neuron.centered else top
    baseline = torch.tensor(0 if neuron.signed else draw(st.integers(0, most)))
    return neuron, current, theta, baseline, steps


@given(cases())
def test_every_form_sums_to_the_count(case: tuple) -> None:  # type: ignore[type-arg]
    neuron, current, theta, baseline, steps = case
    code = neuron.encode(current, theta, baseline, steps)
    count = neuron.fired(code, baseline)
    assert torch.equal(count, code - baseline.int() if neuron.centered else code)
    stepped, binary = neuron.stepped(count, steps), neuron.binary(count, steps)
    phase = list(neuron.iterate_phase(count, steps))
    assert torch.equal(stepped.sum(0, dtype=torch.int32), count)
    assert torch.equal(binary.sum(0, dtype=torch.int32), count)
    assert torch.equal(sum(plane.int() << place for plane, place in phase), count)
    assert int(stepped.abs().max()) <= neuron.levels
    for planes in (binary, neuron.phase(count, steps)):
        assert int(planes.max()) <= 1
        assert int(planes.min()) >= (-1 if neuron.both_signs or neuron.recoding != "binary" else 0)
    assert bool((binary * torch.sign(count) >= 0).all()), "a binary train has one sign"
    top = int(torch.as_tensor(steps).max()) * neuron.levels
    assert [place for _, place in phase] == list(reversed(range(places(top, neuron.recoding))))


@given(cases())
def test_digits_are_canonical(case: tuple) -> None:  # type: ignore[type-arg]
    neuron, current, theta, baseline, steps = case
    count = neuron.fired(neuron.encode(current, theta, baseline, steps), baseline)
    digits = neuron.phase(count, steps).abs()
    for size, own in zip(count.abs().tolist(), digits.sum(0).tolist(), strict=True):
        if neuron.recoding == "binary":
            assert own == size.bit_count()
        else:
            assert own == (size ^ 3 * size).bit_count() <= size.bit_count()
    if neuron.recoding == "signed-digit":
        assert not bool((digits[1:] & digits[:-1]).any()), "no two neighbours fire"


@given(cases(), st.sampled_from(["drain", "constant"]))
def test_membrane_counts_the_code(case: tuple, drive: str) -> None:  # type: ignore[type-arg]
    neuron, current, theta, baseline, steps = case
    trace = neuron.simulate(current, theta, baseline, steps, drive)
    code = neuron.encode(current, theta, baseline, steps)
    assert torch.equal(trace.spikes.sum(0, dtype=torch.int32), neuron.fired(code, baseline))
    assert int(trace.spikes.abs().max()) <= neuron.levels
    if neuron.needs_training and drive == "constant":
        return  # an elastic membrane forgets, see test_elastic.py
    expected = trace.charged - trace.spikes * theta.double()
    torch.testing.assert_close(
        trace.membrane,
        expected,
        rtol=1e-12,
        atol=1e-12 * float(trace.charged.abs().max() + theta.double()),
    )
    if drive == "drain":
        assert torch.equal(trace.spikes, neuron.stepped(neuron.fired(code, baseline), steps))


@given(cases())
def test_the_membrane_of_phase_spikes_fires_the_digits(case: tuple) -> None:  # type: ignore[type-arg]
    neuron, current, theta, baseline, steps = case
    trace = neuron.simulate_phase(current, theta, baseline, steps)
    count = neuron.fired(neuron.encode(current, theta, baseline, steps), baseline)
    assert torch.equal(trace.spikes.to(torch.int8), neuron.phase(count, steps))


@given(cases())
def test_nothing_fires_at_rest(case: tuple) -> None:  # type: ignore[type-arg]
    neuron, current, theta, baseline, steps = case
    rest = torch.zeros_like(current)
    code = neuron.encode(rest, theta, baseline, steps)
    silent = neuron.both_signs or int(baseline) == 0
    for drive in ("drain", "constant"):
        fired = neuron.simulate(rest, theta, baseline, steps, drive).spikes
        assert bool((fired == 0).all()) == silent
    assert bool((neuron.phase(neuron.fired(code, baseline), steps) == 0).all()) == silent


@given(cases())
def test_the_code_is_the_nearest_level(case: tuple) -> None:  # type: ignore[type-arg]
    """Against an independent computation in exact rational arithmetic."""
    from fractions import Fraction
    from math import floor

    neuron, current, theta, baseline, steps = case
    assume(keeps(neuron, "encode"))
    neuron = replace(neuron, price=0.0)
    horizon = torch.as_tensor(steps).expand(current.shape)
    for x, t, code in zip(
        (current.float() / theta.float()).clamp(-1e6, 1e6),
        horizon.tolist(),
        neuron.encode(current, theta, baseline, steps).tolist(),
        strict=True,
    ):
        units, top = Fraction(float(x)), t * neuron.levels
        if neuron.signed:
            magnitude = min(floor(abs(units) + Fraction(1, 2)), top)
            assert code == (magnitude if units >= 0 else -magnitude)
        else:
            assert code == max(0, min(floor(units + Fraction(1, 2)) + int(baseline), top))


@pytest.mark.parametrize(
    ("bits", "steps", "top"), [(4, 2, 30), (4, 4, 60), (8, 2, 510), (1, 3, 3), (2, 1, 3)]
)
def test_top_code_is_steps_times_levels(bits: int, steps: int, top: int) -> None:
    neuron = make_neuron("gif", bits)
    code = neuron.encode(torch.tensor([1e9, torch.inf]), torch.tensor(1.0), torch.tensor(0), steps)
    assert code.tolist() == [top, top]
    assert neuron.stepped(code, steps).tolist() == [[neuron.levels] * 2] * steps


@given(cases())
def test_no_codes_fire_no_spikes(case: tuple) -> None:  # type: ignore[type-arg]
    neuron, _, theta, _, _ = case
    none = torch.zeros(0, 3)
    count, steps = none.int(), torch.ones(0, 1, dtype=torch.long)
    code = neuron.encode(none, theta, none, steps)
    for spikes in (neuron.binary(count, steps), neuron.phase(count, steps)):
        assert sum(s.numel() for s in spikes) == 0
    for drive in ("drain", "constant"):
        assert neuron.simulate(none, theta, none, steps, drive).spikes.sum(0).shape == code.shape
    assert neuron.simulate_phase(none, theta, none, steps).spikes.sum(0).shape == code.shape


def test_infinity_saturates_and_nan_is_silent() -> None:
    neuron = make_neuron("ternary", 2)
    current = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert neuron.encode(current, torch.tensor(1.0), torch.tensor(0), 3).tolist() == [3, -3, 0]


def test_half_below_a_tie_rounds_down() -> None:
    """0.5 − 2⁻²⁵ plus a half is 1.0 in float32, yet the neuron does not reach its threshold."""
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0))
    neuron = make_neuron("if", 1)
    assert int(neuron.encode(below, torch.tensor(1.0), torch.tensor(0))) == 0
    assert int(neuron.encode(torch.tensor(0.5), torch.tensor(1.0), torch.tensor(0))) == 1


def test_constant_current_spreads_spikes_and_drain_does_not() -> None:
    neuron = make_neuron("if", 1)
    arguments = (torch.tensor([3.0]), torch.tensor(1.0), torch.tensor(0), 6)
    assert neuron.simulate(*arguments, drive="drain").spikes.flatten().tolist() == [
        1,
        1,
        1,
        0,
        0,
        0,
    ]
    assert neuron.simulate(*arguments, drive="constant").spikes.flatten().tolist() == [
        1,
        0,
        1,
        0,
        1,
        0,
    ]


def test_decode_inverts_encode_on_levels() -> None:
    neuron = make_neuron("gif", 3)
    theta, baseline, steps = torch.tensor(0.25), torch.tensor(4), 2
    codes = torch.arange(15, dtype=torch.int32)
    assert torch.equal(
        neuron.encode(neuron.decode(codes, theta, baseline), theta, baseline, steps), codes
    )


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="1-bit"):
        make_neuron("if", 4)
    with pytest.raises(ValueError, match="2 bits"):
        make_neuron("ternary", 4)
    with pytest.raises(ValueError, match="did you mean 'gif'"):
        neurons["giff"]
    with pytest.raises(ValueError, match="do not fit"):
        make_neuron("gif", 2).stepped(torch.tensor([4]), 1)
    with pytest.raises(ValueError, match="drive"):
        make_neuron("gif", 2).simulate(
            torch.tensor([1.0]), torch.tensor(1.0), torch.tensor(0), 1, "pulse"
        )  # type: ignore[arg-type]


@pytest.mark.parametrize("drive", ["drain", "constant"])
def test_very_many_steps(drive: str) -> None:
    neuron, steps = make_neuron("if", 1), 4095
    current = torch.tensor([1e30, 4094.5, 2048.0, 0.49, -1e30])
    spikes = neuron.simulate(current, torch.tensor(1.0), torch.tensor(0), steps, drive).spikes  # type: ignore[arg-type]
    assert (
        spikes.sum(0).tolist()
        == neuron.encode(current, torch.tensor(1.0), torch.tensor(0), steps).tolist()
        == [4095, 4095, 2048, 0, 0]
    )


@given(
    st.sampled_from([("gif", 1), ("gif", 4), ("if", 1), ("ternary", 2)]),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_recoding_is_decoding_of_codes(
    kind: tuple[str, int], steps: int, symmetric: bool, seed: int
) -> None:
    from spikellm.quantization.thresholds import threshold_for_range, token_range

    neuron = make_neuron(*kind)
    x = (
        torch.randn(4, 9, generator=torch.Generator().manual_seed(seed)) * 4
    ).round() / 8  # many ties
    top = neuron.levels * steps
    theta, baseline = threshold_for_range(
        *token_range(x), top, symmetric=symmetric and top > 1, signed=neuron.signed
    )
    expected = neuron.decode(neuron.encode(x, theta, baseline, steps), theta, baseline)
    assert torch.equal(neuron.fake_quantize(x, theta, baseline, steps), expected)


def test_published_top_code_is_out_of_reach_of_a_train() -> None:
    neuron = make_neuron("gif-published", 4)
    assert [neuron.top(steps) for steps in (1, 2, 4)] == [15, 31, 63]
    one, zero = torch.tensor([1.0]), torch.tensor([0.0])
    assert neuron.encode(torch.tensor([29.9, 31.0, 40.0]), one, zero, 2).tolist() == [30, 31, 31]
    for unroll in (neuron.stepped, neuron.binary, neuron.phase):
        with pytest.raises(ValueError, match="merged execution only"):
            unroll(torch.tensor([3]), 2)
    with pytest.raises(ValueError, match="merged execution only"):
        neuron.simulate(torch.tensor([3.0]), one, zero, 2)
    with pytest.raises(ValueError, match="merged execution only"):
        neuron.simulate_phase(torch.tensor([3.0]), one, zero, 2)
