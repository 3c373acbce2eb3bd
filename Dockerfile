# Cambrian in an image, for CPUs or for NVIDIA GPUs, with the packages of a lock, by hash.
#
#   make image                                  cambrian:cpu
#   make image LOCK=requirements-cuda.lock      cambrian:cuda: the node brings the driver, the packages CUDA
#
#   docker run --rm -v cambrian-runs:/cambrian/runs -v cambrian-cache:/cambrian/.cache \
#       cambrian:cpu +experiment=quickstart
#
# What follows the image's name are train.py's words; `docker stop -t 300` leaves it time to save. It serves too:
#
#   docker run --rm -p 8000:8000 --entrypoint tini -v cambrian-runs:/cambrian/runs \
#       cambrian:cpu -- python scripts/serve.py quickstart host=0.0.0.0
#
# `make test-docker` runs these instructions in a root of their own.

# Python 3.11, on which the whole suite runs
ARG DEBIAN=12.13-slim

FROM debian:${DEBIAN} AS base
# Debian's mirrors keep one version of a package, so that a pinned one is soon not there.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends ca-certificates python3 tini && \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt/* /var/log/dpkg.log

FROM base AS built
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends python3-venv && \
    rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /cambrian

ARG LOCK=requirements-serve.lock
COPY ${LOCK} /opt/packages.lock
RUN pip install --no-cache-dir --require-hashes -r /opt/packages.lock
COPY . .
# Built with the setuptools of the lock: an isolated build would fetch another one, unhashed.
RUN pip install --no-cache-dir --no-build-isolation --no-deps -e . && \
    rm -rf build && \
    install -d -m 1777 runs .cache

FROM base AS cambrian
COPY --from=built /opt/venv /opt/venv
COPY --from=built /cambrian /cambrian
RUN useradd --uid 10001 --no-create-home --home-dir /cambrian --shell /usr/sbin/nologin cambrian
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="Cambrian" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision=${COMMIT}
# A run's manifest names the commit that the image was built from. Caches lie in one place, which any user may
# write to; NVIDIA's container runtime reads what the image asks for.
ENV CAMBRIAN_COMMIT=${COMMIT} \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/cambrian/.cache \
    MPLCONFIGDIR=/cambrian/.cache/matplotlib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /cambrian
USER 10001:10001
# tini hands signals on: a process 1 without a handler would not hear a SIGTERM in its first seconds.
ENTRYPOINT ["tini", "--", "python", "train.py"]
