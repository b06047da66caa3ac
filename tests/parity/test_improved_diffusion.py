"""Bits per dimension against openai/improved-diffusion, on one tiny random network.

The golden values are what `GaussianDiffusion.calc_bpd_loop` gave at commit 1bc7bbbdc414d83d4abf2ad8cc1446dc36c4e4d5
(MIT) with torch 2.13.0 on a CPU, one thread, by

    git clone https://github.com/openai/improved-diffusion && cd improved-diffusion
    git checkout 1bc7bbbdc414d83d4abf2ad8cc1446dc36c4e4d5
    PYTHONPATH=. python …/tests/parity/improved_diffusion_bpd.py

The four columns are the noisiest step, the middle one, the last but one, and the decoder's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.guidance import clip_x0, unguided
from sfumato.diffusion.likelihood import Bound, bound, chain
from sfumato.diffusion.schedule import TableSchedule, cosine_alpha_bar, linear_alpha_bar

from .improved_diffusion_bpd import CASES, SHAPE, Case, network, pictures

GOLDEN: dict[str, dict[str, Any]] = {
    "learned, cosine": {
        "total": [8.741938591003418, 9.164702415466309],
        "prior": [4.417544232637738e-07, 4.460549973828165e-07],
        "vb": [
            [0.001216966425999999, 0.03380628675222397, 1.0273706912994385, 3.723693609237671],
            [0.0010624261340126395, 0.033796560019254684, 1.197418451309204, 3.928135633468628],
        ],
        "xstart_mse": [
            [1.7379193305969238, 0.4171946048736572, 0.005740708205848932, 0.001901293289847672],
            [1.517179012298584, 0.4173496961593628, 0.006841713096946478, 0.00234318058937788],
        ],
        "mse": [
            [1.687857547949534e-06, 0.35928019881248474, 1.0514755249023438, 1.0860968828201294],
            [1.4734741853317246e-06, 0.35941383242607117, 1.2531369924545288, 1.338521122932434],
        ],
    },
    "learned, linear": {
        "total": [9.362151145935059, 9.354578018188477],
        "prior": [9.274586773244664e-06, 9.364876859763172e-06],
        "vb": [
            [6.081078936404083e-06, 0.006642849184572697, 1.4668784141540527, 3.5420758724212646],
            [5.818814315716736e-06, 0.007567290216684341, 1.4581515789031982, 3.5758426189422607],
        ],
        "xstart_mse": [
            [1.654708981513977, 1.0600273609161377, 0.004835102707147598, 0.0012078997679054737],
            [1.5819201469421387, 1.207351803779602, 0.004812943749129772, 0.0012419908307492733],
        ],
        "mse": [
            [3.37402343575377e-05, 0.07571498304605484, 1.2018018960952759, 1.2066898345947266],
            [3.22561027132906e-05, 0.08623797446489334, 1.1962940692901611, 1.2407469749450684],
        ],
    },
    "large, linear": {
        "total": [8.84437370300293, 8.857010841369629],
        "prior": [9.274586773244664e-06, 9.364876859763172e-06],
        "vb": [
            [6.0846455198770855e-06, 0.006634511053562164, 1.1131361722946167, 3.6357362270355225],
            [5.817007604491664e-06, 0.0075533040799200535, 1.110142707824707, 3.6789395809173584],
        ],
        "xstart_mse": [
            [1.654708981513977, 1.0600273609161377, 0.004835102707147598, 0.0012078997679054737],
            [1.5819201469421387, 1.207351803779602, 0.004812943749129772, 0.0012419908307492733],
        ],
        "mse": [
            [3.37402343575377e-05, 0.07571498304605484, 1.2018018960952759, 1.2066898345947266],
            [3.22561027132906e-05, 0.08623797446489334, 1.1962940692901611, 1.2407469749450684],
        ],
    },
    "small, cosine, unclipped": {
        "total": [100.7886734008789, 111.55623626708984],
        "prior": [4.417544232637738e-07, 4.460549973828165e-07],
        "vb": [
            [89.6492919921875, 0.03824105113744736, 1.7093169689178467, 3.8310303688049316],
            [99.83878326416016, 0.03692163527011871, 1.9953153133392334, 4.044187545776367],
        ],
        "xstart_mse": [
            [127970.1953125, 0.46302926540374756, 0.006105994805693626, 0.0020708099473267794],
            [142515.234375, 0.4470535218715668, 0.007127636577934027, 0.002492402447387576],
        ],
        "mse": [
            [0.12428388744592667, 0.3987521827220917, 1.1183820962905884, 1.1829321384429932],
            [0.13840994238853455, 0.38499417901039124, 1.3055070638656616, 1.4237629175186157],
        ],
    },
    "learned, cosine, respaced": {
        "total": [9.869901657104492, 10.056005477905273],
        "prior": [1.1046542880421839e-07, 1.1154082102393659e-07],
        "vb": [
            [0.0073676565662026405, 0.10155241191387177, 2.9392518997192383, 3.239569664001465],
            [0.0069329640828073025, 0.09013165533542633, 2.8680245876312256, 3.299034833908081],
        ],
        "xstart_mse": [
            [1.679690957069397, 0.35834911465644836, 0.008330537006258965, 0.000745986180845648],
            [1.5804044008255005, 0.31667613983154297, 0.008236361667513847, 0.0007822856423445046],
        ],
        "mse": [
            [4.079251141320128e-07, 0.5091463923454285, 1.0339347124099731, 1.1809560060501099],
            [3.8381276112886553e-07, 0.44993701577186584, 1.0222464799880981, 1.2384212017059326],
        ],
    },
}
VARIANCES = {"LEARNED_RANGE": "learned", "FIXED_LARGE": "large", "FIXED_SMALL": "small"}


class Network(nn.Module):
    """The network of the golden values; only its first three channels where the variance is fixed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return network(x, t)[:, : self.channels]


class Drawn:
    """Noise in the order in which improved-diffusion draws it."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def draw(self) -> Tensor:
        return torch.randn(SHAPE, generator=self.generator)


def ours(case: Case) -> Bound:
    table = cosine_alpha_bar(case.steps)
    if case.schedule == "linear":
        table = linear_alpha_bar(case.steps, 0.1 / case.steps, 20 / case.steps)
    learned = case.variance == "LEARNED_RANGE"
    denoiser = Denoiser(Network(6 if learned else 3), TableSchedule(table), learned_variance=learned)
    denoise = clip_x0(unguided(denoiser)) if case.clip else unguided(denoiser)
    levels = chain(denoiser.schedule, case.respacing or None)
    return bound(denoise, pictures(), levels, Drawn(), variance=VARIANCES[case.variance])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CASES)
def test_bits_per_dimension_are_improved_diffusion_s(name: str) -> None:
    found, wanted = ours(CASES[name]), {key: torch.tensor(value) for key, value in GOLDEN[name].items()}
    last = found.terms.shape[1] - 1
    keep = [0, last // 2, last - 1, last]
    assert last + 1 == (25 if CASES[name].respacing else CASES[name].steps)
    assert float((found.total / wanted["total"] - 1).abs().max()) < 1e-4
    clipped = CASES[name].clip
    assert not clipped or float((found.total - wanted["total"]).abs().max()) < 1e-4  # bits per dimension
    assert torch.allclose(found.prior, wanted["prior"], rtol=0, atol=1e-6)  # KL of nearly equal Gaussians in float32
    assert torch.allclose(found.terms[:, keep], wanted["vb"], rtol=1e-4, atol=1e-5)
    assert torch.allclose(found.decoder, wanted["vb"][:, -1], rtol=1e-4)
    assert torch.allclose(found.x0_mse[:, keep], wanted["xstart_mse"], rtol=1e-4)
    assert torch.allclose(found.eps_mse[:, keep], wanted["mse"], rtol=1e-4)
