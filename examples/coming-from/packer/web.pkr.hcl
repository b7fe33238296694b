# The template that main.vimg beside it replaces.
packer {
  required_plugins {
    qemu = { source = "github.com/hashicorp/qemu", version = "~> 1" }
  }
}

variable "domain" {
  default = "example.org"
}

source "qemu" "web" {
  iso_url          = "https://cdimage.debian.org/debian-cd/current/amd64/iso-cd/debian-12.11.0-amd64-netinst.iso"
  iso_checksum     = "file:https://cdimage.debian.org/debian-cd/current/amd64/iso-cd/SHA256SUMS"
  http_directory   = "preseed"
  boot_command     = ["<esc><wait>auto url=http://{{ .HTTPIP }}:{{ .HTTPPort }}/preseed.cfg<enter>"]
  ssh_username     = "root"
  ssh_password     = "packer"
  ssh_timeout      = "30m"
  cpus             = 2
  memory           = 2048
  disk_size        = "8G"
  format           = "qcow2"
  shutdown_command = "poweroff"
}

build {
  sources = ["source.qemu.web"]

  provisioner "shell" {
    inline = ["apt-get update", "apt-get install -y nginx-light"]
  }
  provisioner "file" {
    source      = "site/"
    destination = "/srv/www"
  }
  provisioner "shell" {
    environment_vars = ["DOMAIN=${var.domain}"]
    script           = "vhost.sh"
  }
  # Removes what two machines must not share.
  provisioner "shell" {
    inline = ["truncate -s 0 /etc/machine-id", "rm -f /etc/ssh/ssh_host_*", "passwd -l root"]
  }
  post-processor "checksum" {
    checksum_types = ["sha256"]
  }
}
