#!/bin/sh
# Entry point of challenge.Dockerfile. TASK is classification, localization or reports; more options
# of `rectvlm challenge` may follow.
set -eu
exec rectvlm challenge "${INPUT:-/input}" --task "${TASK:-classification}" \
  --checkpoint "${MODEL:-/weights/model}" --out "${OUTPUT:-/output}/results.json" "$@"
