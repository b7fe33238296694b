#!/bin/sh
# Lets nginx compress what it sends, and checks that it still likes its
# configuration.
set -eu
cat >/etc/nginx/conf.d/compress.conf <<EOF
gzip_types text/css image/svg+xml application/xml;
gzip_min_length ${MIN_LENGTH};
EOF
nginx -t
