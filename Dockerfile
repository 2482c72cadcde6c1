# think-vllm in a container. The default target adds this package to vLLM's own image, and nothing else:
#   docker build -t think-vllm:0.1.0 .
#   docker build -t think-vllm:0.1.0-cpu --target cpu --build-arg TORCH_INDEX=<url> .
# docs/operations.md says how to run both.
ARG VLLM_VERSION=0.32.0

FROM python:3.11-slim-bookworm AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY think_vllm think_vllm
COPY csrc_triton csrc_triton
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# ---- vLLM's CPU build, to try it with the bundled model; on amd64, which the lock was made for.
FROM python:3.11-slim-bookworm AS cpu
# Package index that has torch's CPU build; without one, the index in use must have it.
ARG TORCH_INDEX=""
ARG VLLM_VERSION
# libnuma is vLLM's; g++ compiles what torch.compile writes.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,source=requirements,target=/requirements \
    pip install --no-cache-dir --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
        -r /requirements/cpu-torch.txt \
    && pip install --no-cache-dir --no-deps -r /requirements/cpu.txt
# Without an index pip can add nothing but this wheel, and fails if something that it needs is missing.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index /wheels/think_vllm-*.whl
RUN useradd --uid 1001 --user-group --create-home --home-dir /cache --shell /usr/sbin/nologin think
COPY models/tiny-recall /opt/think-vllm/models/tiny-recall
WORKDIR /opt/think-vllm
# All that is written lies in /cache: models from the hub, compiled kernels (numba's keep their own name
# below it), torch.compile's results.
ENV HOME=/cache \
    USER=think \
    HF_HOME=/cache/huggingface \
    NUMBA_CACHE_DIR=/cache/numba \
    XDG_CACHE_HOME=/cache \
    XDG_CONFIG_HOME=/cache/config \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    PYTHONDONTWRITEBYTECODE=1
LABEL org.opencontainers.image.title="think-vllm (CPU)" \
      org.opencontainers.image.description="vLLM's CPU build with pruned and quantized KV-cache blocks" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      think-vllm.vllm-version="${VLLM_VERSION}"
USER 1001:1001
VOLUME ["/cache"]
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=10s --start-period=5m --retries=4 \
    CMD ["python3", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=8); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
# `vllm` does not start with the CPU build (think_vllm/tools/serve.py); this takes the same arguments.
ENTRYPOINT ["think-vllm", "serve"]
CMD ["models/tiny-recall", "--kv-channel-prune", "0.5", "--kv-cache-memory-bytes", "268435456"]

# ---- One or more NVIDIA GPUs: vLLM's image as it is, and our wheel.
FROM vllm/vllm-openai:v${VLLM_VERSION} AS gpu
ARG VLLM_VERSION
USER 0:0
# As above: torch, vLLM and numba stay those of the image. The second command is what a server does first.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --no-index \
        /wheels/think_vllm-*.whl \
    && python3 -c "from importlib.metadata import entry_points, version; \
assert version('vllm').split('+')[0] == '${VLLM_VERSION}', version('vllm'); \
[plugin] = entry_points(group='vllm.general_plugins', name='think_vllm'); plugin.load()"
RUN useradd --uid 1001 --user-group --create-home --home-dir /cache --shell /usr/sbin/nologin think
WORKDIR /cache
ENV HOME=/cache \
    USER=think \
    HF_HOME=/cache/huggingface \
    NUMBA_CACHE_DIR=/cache/numba \
    XDG_CACHE_HOME=/cache \
    XDG_CONFIG_HOME=/cache/config \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton \
    PYTHONDONTWRITEBYTECODE=1
LABEL org.opencontainers.image.title="think-vllm" \
      org.opencontainers.image.description="vLLM with pruned and quantized KV-cache blocks" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      think-vllm.vllm-version="${VLLM_VERSION}"
USER 1001:1001
VOLUME ["/cache"]
EXPOSE 8000
# A large model takes many minutes to load; until then failures do not count.
HEALTHCHECK --interval=15s --timeout=10s --start-period=30m --retries=4 \
    CMD ["python3", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=8); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["vllm", "serve"]
