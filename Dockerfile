# The workshop in a container: the same make, the same pins, the same commands.
#   docker build -t fiqa-workshop .
#   docker run --rm -it -v "$PWD":/workshop -v fiqa:/root/.cache -p 127.0.0.1:8888:8888 fiqa-workshop    # JupyterLab
#   docker run --rm -it -v "$PWD":/workshop -v fiqa:/root/.cache -e HF_TOKEN --gpus all fiqa-workshop make run PROFILE=gpu24
# What runs write stays in this folder, downloads in the volume `fiqa`. gcc: a GPU's kernels are compiled at their first use.
FROM python:3.12-slim-bookworm

RUN apt-get update \
    && apt-get install -y --no-install-recommends chromium fonts-dejavu-core gcc git libc6-dev make \
    && rm -rf /var/lib/apt/lists/*

ENV VENV=/opt/fiqa-workshop PIP_NO_CACHE_DIR=1
WORKDIR /workshop

# What decides the environment comes first: a changed notebook does not install 7.7 GB again.
COPY Makefile pyproject.toml constraints.txt README.md LICENSE ./
COPY scripts scripts
COPY fiqa_helpers/__init__.py fiqa_helpers/
COPY fiqa_helpers/machinery/__init__.py fiqa_helpers/machinery/
RUN make env

COPY . .

EXPOSE 8888
CMD ["make", "lab", "ARGS=--ip=0.0.0.0 --no-browser"]
