# Two images from one lock: `--target api` (no torch inside) and `--target worker`.
# tests/deploy runs the pip and start commands below as they stand, in a clean virtual environment.
ARG PYTHON_VERSION=3.11
FROM python:${PYTHON_VERSION}-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 OLORA_HOME=/data OLORA_MODELS_DIR=/models HF_HOME=/data/hub
RUN useradd --create-home --uid 1000 olora && install -d -o olora -g olora /data /models
WORKDIR /app
COPY pyproject.toml constraints.txt README.md ./

FROM base AS api
RUN --mount=type=cache,target=/root/.cache/pip pip install -c constraints.txt -e '.[api,postgres]'
COPY alembic.ini ./
COPY migrations migrations
COPY olora_core olora_core
COPY store store
COPY api api
COPY cli cli
COPY examples/base examples/base
USER olora
EXPOSE 8000
ENV OLORA_HOST=0.0.0.0 OLORA_PORT=8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["olora", "serve", "--no-worker"]

FROM base AS worker
# The index to take torch from, for a CPU build or another CUDA version; empty: the registry's own build.
ARG TORCH_INDEX_URL=
RUN --mount=type=cache,target=/root/.cache/pip pip install "$(grep '^torch==' constraints.txt)" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
# The clients of experiment trackers, for a service that is set up for them: wandb, mlflow or wandb,mlflow.
ARG TRACKERS=
RUN --mount=type=cache,target=/root/.cache/pip pip install -c constraints.txt -e ".[worker,gpu,postgres${TRACKERS:+,$TRACKERS}]"
COPY alembic.ini ./
COPY migrations migrations
COPY olora_core olora_core
COPY store store
COPY worker worker
COPY cli cli
COPY examples/base examples/base
USER olora
CMD ["olora", "worker"]
