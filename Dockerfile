# unisd with what `train`, `study`, `report` and `merge --gguf` need.
#
#   docker build -t unisd .                                                           # CPU
#   docker build -t unisd:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .      # CUDA
#   docker run --rm -v "$PWD:/work" unisd train --max_steps 20
#   docker run --rm --gpus all --ipc host -v "$PWD:/work" unisd:cuda train --config run.yaml
FROM python:3.13-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# bubblewrap isolates code that a model wrote; Triton compiles its kernels with gcc.
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip install --no-cache-dir -c /src/constraints.txt --index-url "$TORCH_INDEX" torch \
    && pip install --no-cache-dir -c /src/constraints.txt "/src[gguf,study]"
WORKDIR /work
ENTRYPOINT ["unisd"]
CMD ["--help"]
