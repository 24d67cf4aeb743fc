# Two images:
#   docker build --target navagent -t navagent .                   everything from pip, no GPU or display needed
#   docker build --target navagent-habitat -t navagent-habitat .   with habitat-sim and habitat-lab, headless
# With --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu PyTorch comes without CUDA, smaller.

FROM condaforge/miniforge3:25.3.1-0 AS navagent-habitat
ARG PIP_EXTRA_INDEX_URL=""

# What habitat-sim renders with: the vendors' libraries come with the driver, Mesa's draw on the processor.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libegl1 libegl-mesa0 libgl1 libglvnd0 libopengl0 \
    && rm -rf /var/lib/apt/lists/*

# The stable channel has builds for Python 3.9 alone, and navagent needs 3.11: hence the nightly one.
RUN conda create --yes --name habitat --channel conda-forge --channel aihabitat-nightly --override-channels \
        python=3.11 habitat-sim=0.3.3.2026.03.12 headless "numpy>=2.0,<2.4" \
    && conda clean --all --yes

RUN useradd --create-home --uid 10001 navagent && install -d -o navagent -g navagent /workspace
WORKDIR /opt/navagent

COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY deploy deploy
COPY navagent navagent
COPY envs envs
COPY policies policies
COPY configs configs
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# habitat-lab pins numpy 1.26, which habitat-sim cannot use: it comes without what it pins.
RUN cut -d= -f1 deploy/habitat-constraints.txt | sed -n 's/^[a-z].*/^&==/p' > /tmp/replaced \
    && grep --invert-match --file=/tmp/replaced constraints.txt > /tmp/constraints.txt \
    && cat deploy/habitat-constraints.txt >> /tmp/constraints.txt \
    && CONSTRAINTS=/tmp/constraints.txt deploy/install.sh /opt/conda/envs/habitat . gym imageio-ffmpeg \
    && CONSTRAINTS=/tmp/constraints.txt deploy/install.sh /opt/conda/envs/habitat --no-deps habitat-lab

USER 10001
WORKDIR /workspace
ENV PATH=/opt/conda/envs/habitat/bin:$PATH \
    NAVAGENT_CACHE=/workspace/.cache \
    WARP_CACHE_PATH=/workspace/.cache/warp \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=all \
    MAGNUM_LOG=quiet \
    HABITAT_SIM_LOG=quiet
VOLUME /workspace
HEALTHCHECK --interval=10m --timeout=2m --start-period=1m CMD ["navagent", "doctor"]
ENTRYPOINT ["navagent"]
CMD ["--help"]


# The last target is what a plain `docker build .` makes.
FROM python:3.12.12-slim-bookworm AS navagent
ARG PIP_EXTRA_INDEX_URL=""

# The agent's own user: containers on clusters must not run as root.
RUN useradd --create-home --uid 10001 navagent && install -d -o navagent -g navagent /workspace
WORKDIR /opt/navagent

COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY deploy deploy
COPY navagent navagent
COPY envs envs
COPY policies policies
COPY configs configs
RUN PIP_NO_CACHE_DIR=1 deploy/install.sh /opt/venv

USER 10001
# Runs and generated homes go to /workspace: mount a volume there to keep them.
WORKDIR /workspace
ENV PATH=/opt/venv/bin:$PATH \
    NAVAGENT_CACHE=/workspace/.cache \
    WARP_CACHE_PATH=/workspace/.cache/warp
VOLUME /workspace
HEALTHCHECK --interval=10m --timeout=2m --start-period=1m CMD ["navagent", "doctor"]
ENTRYPOINT ["navagent"]
CMD ["--help"]
