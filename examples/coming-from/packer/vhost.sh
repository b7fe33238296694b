cat >/etc/nginx/sites-enabled/default <<END
server {
    listen 80 default_server;
    server_name $DOMAIN;
    root /srv/www;
}
END
nginx -t
