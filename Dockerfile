# The image for GB300 nodes (linux/arm64) and for linux/amd64. What of it was run, and how to build it: docs/deploy/README.md
# BASE is Debian 12 by digest, as in debian:bookworm-slim@sha256:...; there is no default, because a tag can change.
# torch's wheels bring the CUDA libraries, the host brings the driver (NVIDIA Container Toolkit).
ARG BASE

FROM ${BASE} AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/dsv4serve
ENV PATH=/opt/dsv4serve/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# torch first and alone: pip keeps that build when it resolves the rest, and the layer survives code changes.
ARG TORCH=torch==2.13.0
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "${TORCH}"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY csrc csrc
COPY kernels kernels
COPY dsv4serve dsv4serve
ARG EXTRAS=cuda
# An installation without a C compiler goes on without the C kernels; an image must not. pyproject.toml says the versions.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[${EXTRAS}]" \
    && python -c "from dsv4_kernels import cpu; assert cpu.library, 'the C kernels are missing'"

FROM ${BASE}
# Triton compiles the launcher of each kernel at run time: that takes a C compiler and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 --user-group dsv4serve
COPY --from=build /opt/dsv4serve /opt/dsv4serve
ENV PATH=/opt/dsv4serve/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# The file system may be read-only but for /tmp, and nothing is ever downloaded.
ENV TRITON_CACHE_DIR=/tmp/triton HF_HUB_OFFLINE=1
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /home/dsv4serve
EXPOSE 8000
# SIGTERM drains: running requests finish, new ones get 503, then the container exits with 0.
STOPSIGNAL SIGTERM
# Loading a large checkpoint takes minutes; until it has been healthy once, a failure counts only after half an hour.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["dsv4serve"]
CMD ["launch", "--host", "0.0.0.0"]
