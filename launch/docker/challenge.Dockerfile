# A container for the VLM3D challenge: read-only CTs in, results.json out, no network.
#
#   docker build -f launch/docker/challenge.Dockerfile -t rectvlm-challenge .
#   docker run --rm --network=none --read-only --tmpfs /tmp --gpus all -e TASK=classification \
#     -v "$PWD/cts:/input:ro" -v "$PWD/weights:/weights:ro" -v "$PWD/results:/output" rectvlm-challenge
#
# /weights holds model/, an exported model (`rectvlm export`), and for reports hub/, a cache of
# huggingface_hub with the language model that it names.
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
RUN pip install --no-cache-dir . "$TORCH"
COPY --chmod=755 launch/docker/challenge.sh /usr/local/bin/challenge.sh

# Nothing is fetched at run time, and only /tmp and /output are written to.
ENV INPUT=/input \
    OUTPUT=/output \
    MODEL=/weights/model \
    HF_HUB_CACHE=/weights/hub \
    HF_HUB_OFFLINE=1 \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# The challenge refuses containers that run as root.
RUN useradd --uid 1000 --home-dir /tmp --no-create-home challenge \
    && mkdir -p /input /output /weights && chown challenge /output
# By number, so that a cluster can tell that it is not root.
USER 1000
WORKDIR /tmp
ENTRYPOINT ["/usr/local/bin/challenge.sh"]
