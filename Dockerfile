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
COPY pyproject.toml README.md LICENSE NOTICE ./
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
# Where data_dir is to be: mount a volume there to keep books and budgets. The configuration above
# says .sidecar, beside itself, where nobody may write.
RUN install -d -o 10001 -g 10001 -m 0700 /var/lib/sidecar && \
    ln -s /var/lib/sidecar /etc/sidecar/.sidecar
# Days of budgets begin at a team's midnight. The base has the zone files; one that has none fails
# here, and not when a team names its zone.
RUN ["/opt/sidecar/bin/python", "-c", "from zoneinfo import ZoneInfo; ZoneInfo('Asia/Shanghai')"]

# A number, not a name: Kubernetes cannot check runAsNonRoot against a name.
USER 10001:10001
STOPSIGNAL SIGTERM
# No HEALTHCHECK: the admin address is configuration, and Kubernetes asks /livez and /readyz itself.
ENTRYPOINT ["sidecar"]
CMD ["run", "--config", "/etc/sidecar/config.yaml"]
