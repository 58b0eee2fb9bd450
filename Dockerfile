# The sidecar as an image: one virtual environment, no shell script, no root. The process handles
# signals and starts no children, so it can be PID 1 without an init.

FROM python:3.11-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src

# The locked dependencies first: this layer is built again only when the lock changes. The hashes
# hold whichever index or mirror the files come from; wheels only, so nothing is compiled here.
RUN python -m venv --without-pip /opt/sidecar
COPY requirements/run.txt requirements/run.txt
RUN pip --python /opt/sidecar/bin/python install --no-cache-dir --no-deps --only-binary :all: \
        --require-hashes -r requirements/run.txt

# The lock holds the build backend too, so the product's own wheel is built with no network.
COPY pyproject.toml README.md LICENSE ./
COPY sidecar/ sidecar/
COPY filters/ filters/
RUN pip --python /opt/sidecar/bin/python install --no-cache-dir --no-deps --no-index \
        --no-build-isolation .

FROM python:3.11-slim
# Unbuffered: the last log lines before an end must not be lost. No .pyc: the root is read only.
ENV PATH=/opt/sidecar/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
COPY --from=build /opt/sidecar /opt/sidecar
# A start that works as it is; in use, mount your own directory over /etc/sidecar.
COPY config.yaml /etc/sidecar/config.yaml

# A number, not a name: Kubernetes cannot check runAsNonRoot against a name.
USER 10001:10001
STOPSIGNAL SIGTERM
# No HEALTHCHECK: the admin address is configuration, and Kubernetes asks /livez and /readyz itself.
ENTRYPOINT ["sidecar"]
CMD ["run", "--config", "/etc/sidecar/config.yaml"]
