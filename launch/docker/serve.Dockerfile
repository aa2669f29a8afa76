# The server of `rectvlm serve`: a page and an HTTP API for CTs.
#
#   docker build -f launch/docker/serve.Dockerfile -t rectvlm-serve .
#   docker run --rm --read-only --tmpfs /tmp --gpus all -e RECTVLM_TOKEN="$(openssl rand -hex 16)" \
#     -p 127.0.0.1:8000:8000 -v "$PWD/weights:/weights:ro" rectvlm-serve
#
# /weights is laid out as for challenge.Dockerfile. Uploads and results stay in /tmp.
FROM python:3.12-slim

# The wheels of torch bring CUDA's libraries; the driver comes from the host.
ARG TORCH=torch==2.13.0
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /opt/rectvlm
RUN pip install --no-cache-dir "$TORCH"
COPY pyproject.toml README.md LICENSE ./
COPY ds_configs ds_configs
COPY rectvlm rectvlm
RUN pip install --no-cache-dir ".[serve]" "$TORCH"

# Nothing is fetched at run time, and only /tmp is written to.
ENV HF_HUB_CACHE=/weights/hub \
    HF_HUB_OFFLINE=1 \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

RUN useradd --uid 1000 --home-dir /tmp --no-create-home server && mkdir -p /weights
# By number, so that a cluster can tell that it is not root.
USER 1000
WORKDIR /tmp
EXPOSE 8000
ENTRYPOINT ["rectvlm", "serve", "/weights/model", "--host", "0.0.0.0"]
