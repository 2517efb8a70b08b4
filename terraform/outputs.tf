locals {
  https = data.ibm_database_connection.this.https[0]
  host  = local.https.hosts[0]
}

output "ES_URL" {
  description = "URL of Elasticsearch with user and password, ready to export."
  value       = "https://${urlencode("admin")}:${urlencode(var.elastic_password)}@${local.host.hostname}:${local.host.port}"
  sensitive   = true
}

output "ES_CA_CERT" {
  description = "Certificate of the service's own CA in PEM: write it to a file and export the file's path as ES_CA_CERT."
  value       = base64decode(local.https.certificate[0].certificate_base64)
  sensitive   = true
}

output "name" {
  description = "Name of the database in the console's resource list."
  value       = ibm_database.elasticsearch.name
}

output "crn" {
  description = "Cloud Resource Name of the database."
  value       = ibm_database.elasticsearch.id
}

output "console_url" {
  description = "Page of the database in IBM Cloud's console."
  value       = ibm_database.elasticsearch.resource_controller_url
}
