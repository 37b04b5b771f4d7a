# jaxdg for CPU, or for NVIDIA GPUs:
#
#     docker build -t jaxdg .
#     docker build -t jaxdg:cuda13 --build-arg EXTRAS=cuda13 .
#
# CUDA comes with JAX's wheels, so the base image is the same; the host needs NVIDIA's driver and
# its container toolkit. Data, weights and runs are mounted:
#
#     docker run --rm -v "$PWD/data:/data" -v "$PWD/runs:/work/runs" jaxdg \
#         train --config streets_tiny --workdir runs/streets
#     docker run --rm --gpus all -v "$PWD/data:/data" -v "$PWD/runs:/work/runs" jaxdg:cuda13 \
#         train --config gta5_eva02 --workdir runs/gta5
FROM python:3.12-slim

ARG EXTRAS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

# Dependencies have a layer of their own, so that a change of the code does not install them again.
WORKDIR /src
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
RUN mkdir jaxdg configs && touch jaxdg/__init__.py \
    && pip install ".${EXTRAS:+[$EXTRAS]}" && pip uninstall --yes jaxdg
COPY jaxdg jaxdg
COPY configs configs
RUN pip install --no-deps .

# Runs are written as this user; pass --user "$(id -u):$(id -g)" to own them on the host.
RUN useradd --create-home jaxdg && mkdir -p /work/runs /data && chown -R jaxdg /work
USER jaxdg
WORKDIR /work
ENV JAXDG_DATA=/data
ENTRYPOINT ["jaxdg"]
CMD ["--help"]
