# navagent without Habitat: everything comes from pip, and no GPU or display is needed.
FROM python:3.12-slim

# The agent's own user: containers on clusters must not run as root.
RUN useradd --create-home --uid 1000 navagent && install -d -o navagent -g navagent /workspace
WORKDIR /opt/navagent

COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY navagent navagent
COPY envs envs
COPY policies policies
COPY configs configs
RUN pip install --no-cache-dir --constraint constraints.txt .

USER navagent
# Runs and generated homes go to /workspace: mount a volume there to keep them.
WORKDIR /workspace
ENV NAVAGENT_CACHE=/workspace/.cache \
    WARP_CACHE_PATH=/workspace/.cache/warp
VOLUME /workspace

ENTRYPOINT ["navagent"]
CMD ["--help"]
