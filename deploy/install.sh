#!/usr/bin/env bash
# Installs navagent with the published versions: used by the Dockerfile, by `make` and so by CI.
#
# usage: deploy/install.sh ENVIRONMENT [PIP ARGUMENTS]
#   deploy/install.sh .venv                          # the package
#   deploy/install.sh .venv --editable '.[dev]'      # to work on it
#
# ENVIRONMENT is made with $PYTHON (python3) where it is not there yet. $CONSTRAINTS is a file of versions,
# constraints.txt by default.
set -euo pipefail
environment=${1:?usage: deploy/install.sh ENVIRONMENT [PIP ARGUMENTS]}
shift
[ "$#" -gt 0 ] || set -- .
mkdir -p "$environment"
environment=$(cd "$environment" && pwd)
cd "$(dirname "$0")/.."
[ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment"
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-warn-script-location \
  --constraint "${CONSTRAINTS:-constraints.txt}" "$@"
"$environment/bin/navagent" --version
