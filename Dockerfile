# qhybrid on CUDA. The same commands as outside: scripts/setup installs, scripts/test tests.
#
#   docker build -t qhybrid .
#   docker run --gpus all -v "$PWD/runs:/qhybrid/runs" -v ~/.cache/huggingface:/models \
#       qhybrid sft recipes/llama2_7b_instruct.yaml
#
# torch from PyPI brings its own CUDA libraries; the image needs only the driver of the host.
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /qhybrid
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY scripts scripts
COPY recipes recipes
COPY qhybrid qhybrid
ENV PIP_NO_CACHE_DIR=1 HF_HOME=/models
RUN scripts/setup

COPY tests tests
ENV PATH=/qhybrid/.venv/bin:$PATH
ENTRYPOINT ["qhybrid"]
CMD ["--help"]
