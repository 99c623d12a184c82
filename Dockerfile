# dlight-serve for CPUs. Build: docker build -t dlight-serve .
# Run:   docker run -p 8000:8000 -v dlight-cache:/var/cache/dlight-serve dlight-serve

FROM python:3.11.14-slim-bookworm AS builder
WORKDIR /src
RUN python -m venv /opt/dlight-serve
ENV PATH=/opt/dlight-serve/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

# The dependencies alone first: a change of our own source then leaves this layer as it is.
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > requirements.txt \
    && pip install --no-cache-dir -c constraints.txt -r requirements.txt

COPY README.md LICENSE NOTICE ./
COPY serve serve
COPY profiles profiles
COPY loadtest loadtest
RUN pip install --no-cache-dir --no-deps . && pip check

FROM python:3.11.14-slim-bookworm
# TVM links every library that it compiles with the system's C++ compiler.
# No version: Debian's index keeps one only, so a pinned one breaks the build at its next update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# The number, not the name, is what Kubernetes' runAsNonRoot can check.
RUN groupadd --gid 10001 dlight \
    && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin dlight \
    && install --directory --owner=10001 --group=10001 /var/cache/dlight-serve

COPY --from=builder /opt/dlight-serve /opt/dlight-serve

# Compiled libraries and downloaded weights outlive the container in this one volume.
ENV PATH=/opt/dlight-serve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    DLIGHT_CACHE_DIR=/var/cache/dlight-serve \
    HF_HOME=/var/cache/dlight-serve/huggingface
VOLUME /var/cache/dlight-serve

USER 10001:10001
WORKDIR /home/dlight
EXPOSE 8000

# The start may compile for minutes. Override this where the port is another or TLS is on.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8000/health', timeout=4)"]

ENTRYPOINT ["dlight-serve"]
CMD ["run", "--host", "0.0.0.0"]
