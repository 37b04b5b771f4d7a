"""Peak rates and memory of the devices that steps are planned for."""

import dataclasses

from jaxdg.commands.flops import PEAK_TFLOPS

LINK_SHARE = 0.8  # of the interconnect's peak that collectives reach
USABLE = (
    0.9  # of the memory; the rest is for the runtime, the compiler's own buffers and fragmentation
)


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Peak rates of one chip.

    Attributes:
        flops: dense bfloat16 operations a second.
        float32: share of that rate at which float32 products run by default: TF32 on GPUs, one
            bfloat16 pass on TPUs.
        memory: bytes.
        bandwidth: of the memory, bytes a second.
        link: bytes a second a chip can send to the chips of its domain around a ring.
        domain: chips that are joined by such links: of a node, or of a pod.
        network: bytes a second a chip can send out of its domain.
    """

    flops: float
    float32: float
    memory: float
    bandwidth: float
    link: float
    domain: int
    network: float


# GPUs: NVIDIA's data sheets of H100 SXM, H200 SXM and A100 80GB SXM (NVLink: half of the sum of
# both directions), nodes of eight and one network card a GPU as in DGX H100, DGX H200 (400 Gb/s)
# and DGX A100 (200 Gb/s). B200: the data sheets of HGX B200 and DGX B200, memory as one GPU of an
# HGX B200 has it. TPUs: docs.cloud.google.com/tpu/docs, and for a ring along one axis of
# the torus and for the data centre's network the tables of jax-ml.github.io/scaling-book/tpus.
ACCELERATORS = {
    "h100": Accelerator(PEAK_TFLOPS["H100"] * 1e12, 0.5, 80e9, 3.35e12, 450e9, 8, 50e9),
    "h200": Accelerator(PEAK_TFLOPS["H200"] * 1e12, 0.5, 141e9, 4.8e12, 450e9, 8, 50e9),
    "a100": Accelerator(PEAK_TFLOPS["A100"] * 1e12, 0.5, 80e9, 2.039e12, 300e9, 8, 25e9),
    "b200": Accelerator(PEAK_TFLOPS["B200"] * 1e12, 0.5, 180e9, 7.67e12, 900e9, 8, 50e9),
    "tpu_v4": Accelerator(
        PEAK_TFLOPS["TPU v4"] * 1e12, 1.0, 32.0 * 2**30, 1.2e12, 90e9, 4096, 6.25e9
    ),
    "tpu_v5e": Accelerator(PEAK_TFLOPS["TPU v5 lite"] * 1e12, 1.0, 16e9, 819e9, 90e9, 256, 3.125e9),
    "tpu_v5p": Accelerator(PEAK_TFLOPS["TPU v5"] * 1e12, 1.0, 95e9, 2.765e12, 180e9, 8960, 6.25e9),
    "tpu_v6e": Accelerator(
        PEAK_TFLOPS["TPU v6 lite"] * 1e12, 1.0, 32e9, 1.638e12, 180e9, 256, 12.5e9
    ),
}
