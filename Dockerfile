# qrank serve on a CPU: onnxruntime, and OpenVINO on x86-64; no torch, no root.
#   docker build -t qrank .
#   docker run --rm -p 8000:8000 qrank
# --build-arg EXTRAS=cpu,serve adds OpenVINO, faster and larger.
FROM python:3.12-slim AS build
ARG EXTRAS=onnx,serve
WORKDIR /source
COPY pyproject.toml README.md LICENSE MANIFEST.in ./
COPY qrank qrank
COPY converters converters
COPY models models
COPY haystack_integrations haystack_integrations
COPY deploy/pyinstaller deploy/pyinstaller
# The image needs neither pip, nor packages' own tests, nor onnxruntime's library for C programs.
RUN python -m venv --without-pip /opt/qrank && \
    python -m pip --python /opt/qrank/bin/python install --no-cache-dir --no-compile \
      ".[${EXTRAS}]" && \
    find /opt/qrank -type d -name tests -prune -exec rm -r {} + && \
    find /opt/qrank -name "libonnxruntime.so.*" -delete
# A server that starts here leaves the bytecode of what it imports, and no more. `timeout` ends it.
RUN timeout 15 /opt/qrank/bin/qrank serve --port 0 || [ $? -eq 124 ]

FROM python:3.12-slim
COPY --from=build /opt/qrank /opt/qrank
RUN useradd --system --create-home --home-dir /var/lib/qrank qrank
USER qrank
# What was verified and compiled once is kept here: mount a volume to start faster.
ENV PATH=/opt/qrank/bin:$PATH QRANK_CACHE=/var/lib/qrank HF_HUB_DISABLE_TELEMETRY=1
EXPOSE 8000
HEALTHCHECK --start-period=30s CMD ["python", "-c", \
    "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=3)"]
# Told to stop with SIGTERM; give it as long as --drain-timeout.
ENTRYPOINT ["qrank", "serve", "--host", "0.0.0.0"]
