# syntax=docker/dockerfile:1
# NOT BUILT YET: the machines this release was made on have no Docker engine. Written for linux/amd64 and
# linux/arm64 (GB300 hosts are aarch64); the C kernels are compiled in the image, so both use the same file:
#   docker buildx build --platform linux/arm64 -t dsv4serve .
#   docker run --gpus all -p 127.0.0.1:8000:8000 -v /models:/models:ro dsv4serve launch --host 0.0.0.0 --model /models/demo
ARG BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04

FROM ${BASE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/dsv4serve
ENV PATH=/opt/dsv4serve/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# torch first and alone: pip keeps that build when it resolves the rest, and the layer survives code changes.
ARG TORCH=torch==2.13.0
RUN pip install "${TORCH}"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY csrc csrc
COPY kernels kernels
COPY dsv4serve dsv4serve
RUN pip install ".[cuda]"

FROM ${BASE}
RUN apt-get update && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --create-home --uid 10001 dsv4serve
COPY --from=build /opt/dsv4serve /opt/dsv4serve
ENV PATH=/opt/dsv4serve/bin:$PATH PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
USER dsv4serve
WORKDIR /home/dsv4serve
EXPOSE 8000
# SIGTERM drains: running requests finish, new ones get 503, then the container exits 0.
STOPSIGNAL SIGTERM
ENTRYPOINT ["dsv4serve"]
CMD ["launch", "--host", "0.0.0.0"]
