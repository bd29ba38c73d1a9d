# CPU:   docker build -t reflux .
# CUDA:  docker build -t reflux:cuda --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04 --build-arg TORCH=torch==2.11.0 .
# Then:  docker run --rm -v "$PWD:/work" reflux matrix quickstart
#        docker run --rm --gpus all -v "$PWD:/work" reflux:cuda run mine.toml --ranks 8
# A devel image for CUDA: Triton compiles kernels when they are first used. PIP_EXTRA_INDEX_URL as a build argument names another
# place for torch, a CPU-only build for instance.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}
ARG TORCH=torch==2.13.0
ARG EXTRAS=sandbox
ARG PIP_EXTRA_INDEX_URL=

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# gcc stays: Triton needs it. An image without Python gets the system's
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential libseccomp2 \
    && { command -v python3 || apt-get install -y --no-install-recommends python3 python3-dev python3-venv; } \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/reflux/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# versions come with the build arguments and pyproject.toml
# hadolint ignore=DL3013
RUN python3 -m venv /opt/reflux && python -m pip install "${TORCH}"

WORKDIR /src
COPY pyproject.toml CMakeLists.txt README.md LICENSE py.typed ./
COPY package package
COPY configs configs
COPY kernels kernels
COPY tokenalign tokenalign
COPY trainer trainer
# hadolint ignore=DL3013
RUN python -m pip install ".[${EXTRAS}]" && reflux --version

RUN useradd --create-home --uid 10001 reflux && mkdir /work && chown reflux /work
USER 10001
WORKDIR /work
ENTRYPOINT ["reflux"]
CMD ["--help"]
