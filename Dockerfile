# docker build -t books-api . && docker run -p 127.0.0.1:8000:8000 -v books:/data books-api
# Any image of Debian or Ubuntu with Python 3.11 or newer and its venv module will do as the base.
ARG BASE=docker.io/library/python:3.11-slim

FROM ${BASE} AS packages
COPY requirements.txt /
# The service runs without pytest, and cannot write bytecode: pip compiles it here.
RUN grep -v '^pytest' requirements.txt > packages.txt \
    && python3 -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --disable-pip-version-check -r packages.txt \
    && /venv/bin/pip uninstall -qy setuptools pip

FROM ${BASE}
RUN useradd --uid 1000 --no-create-home --shell /usr/sbin/nologin books && install -d -o books -g books -m 700 /data
COPY --from=packages /venv /venv
WORKDIR /app
COPY LICENSE *.py ./
COPY migrations migrations
COPY static static
RUN /venv/bin/python -m compileall -q .
ENV DATABASE_URL=sqlite:////data/books.db
VOLUME /data
EXPOSE 8000
USER 1000
HEALTHCHECK --interval=30s --timeout=20s --start-period=60s CMD ["/venv/bin/python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000); c.request('GET', '/health'); exit(c.getresponse().status != 200)"]
# `docker stop` kills after 10 seconds.
CMD ["/venv/bin/uvicorn", "main:app", "--host", "0.0.0.0", "--port", "8000", "--timeout-keep-alive", "95", "--timeout-graceful-shutdown", "4", "--timeout-worker-healthcheck", "15"]
